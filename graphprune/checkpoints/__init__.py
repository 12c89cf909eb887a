"""Models larger than the memory: a folder of safetensors in, a smaller one out, tensor by tensor."""
