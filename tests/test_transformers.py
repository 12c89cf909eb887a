"""Networks of transformers: pruned in their own class, equal to the masked original at other lengths, and generating."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphprune.compress import Result, compress

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("quiet_and_quick")

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
GROUPED = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "use_cache": False}


class Only(nn.Module):
    """A network that gives back its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(**inputs).logits
        return logits


def made(name: str, config: str, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))  # neither zeros nor ones, which hide mistakes
    return network


def ids(length: int = 7, batch: int = 2) -> Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(length))


def compressed(network: nn.Module, exclude: Sequence[str] = (), **inputs: Tensor) -> Result:
    result = compress(network, inputs, 0.5, round_to=1, exclude=tuple(exclude))
    assert type(result.model) is type(network), result.shrunk.obstacle
    return result


def masked(network: nn.Module, result: Result) -> Any:
    """The original with every removed entry set to zero, where no norm counts what is left."""
    network = copy.deepcopy(network)
    tensors = dict(network.named_parameters())
    with torch.no_grad():
        for axis, kept in result.plan.keep.items():
            if axis.tensor in tensors:  # the frequencies of rotations turn what is zero
                gone = torch.ones(tensors[axis.tensor].shape[axis.dim], dtype=torch.bool)
                gone[torch.as_tensor(kept)] = False
                tensors[axis.tensor].index_fill_(axis.dim, gone.nonzero()[:, 0], 0.0)
    return network


def embeddings(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Embedding)]


def generated(network: Any, tokens: Tensor, use_cache: bool) -> Tensor:
    found: Tensor = network.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, min_new_tokens=5, do_sample=False,
        use_cache=use_cache,
    )  # fmt: skip
    return found


def check_generation(network: nn.Module, result: Result) -> None:
    """Generates with and without a cache, as the masked original does."""
    small: Any = result.model
    other = masked(network, result)
    small, other = (getattr(one, "network", one) for one in (small, other))
    expected = generated(other, ids(), use_cache=False)
    assert expected.shape[1] > 5
    for use_cache in (False, True):
        assert torch.equal(generated(small, ids(), use_cache), expected)


def test_an_encoder() -> None:
    network = made("BertForSequenceClassification", "BertConfig", **TEXT, max_position_embeddings=16)
    result = compressed(network, input_ids=ids(), attention_mask=torch.ones(2, 7, dtype=torch.int64))
    assert result.report["params"]["ratio"] > 2
    result = compressed(network, embeddings(network), input_ids=ids())
    with torch.no_grad():
        for length in (7, 11):
            expected = masked(network, result)(input_ids=ids(length)).logits
            torch.testing.assert_close(result.model(input_ids=ids(length)).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "sizes"),
    [
        ("LlamaForCausalLM", "LlamaConfig", GROUPED),
        ("Phi3ForCausalLM", "Phi3Config", GROUPED),  # its heads are counted in the configuration
        ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    ],
)
def test_decoders_generate(name: str, config: str, sizes: dict[str, Any]) -> None:
    network = made(name, config, **sizes)
    result = compressed(network, input_ids=ids())
    assert result.report["params"]["ratio"] > 2
    small: Any = result.model
    assert torch.equal(generated(small, ids(), use_cache=True), generated(small, ids(), use_cache=False))
    check_generation(network, compressed(network, embeddings(network), input_ids=ids()))


def test_experts_lose_hidden_channels() -> None:
    network = made("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4)
    small: Any = compressed(network, input_ids=ids()).model
    experts = small.model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape == (4, 48, 16) and experts.down_proj.shape == (4, 16, 24)


def test_an_encoder_with_a_decoder() -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
    network = Only(made("T5ForConditionalGeneration", "T5Config", **sizes, decoder_start_token_id=0, use_cache=False))
    inputs = {"input_ids": ids(), "decoder_input_ids": ids(5)}
    assert compressed(network, **inputs).report["params"]["ratio"] > 2
    check_generation(network, compressed(network, ["network.*.embed_tokens"], **inputs))


def test_outputs_that_nobody_asked_for_are_pinned_by_name() -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 60}
    network = made("T5ForConditionalGeneration", "T5Config", **sizes, decoder_start_token_id=0, use_cache=False)
    result = compressed(network, input_ids=ids(), decoder_input_ids=ids(5))
    reasons = [pin["reason"] for pin in result.report["pinned"]]
    assert any("encoder_last_hidden_state" in reason for reason in reasons)


def test_a_cache_among_the_outputs_leaves_parts_and_the_remedy() -> None:
    network = made("LlamaForCausalLM", "LlamaConfig", **{**GROUPED, "use_cache": True})
    result = compressed(network, input_ids=ids())
    parts = result.report["parts"]
    assert "use_cache = False" in parts["stopped"][""]
    assert "model.layers.0.mlp" in parts["captured"]
    small: Any = result.model
    assert torch.equal(generated(small, ids(), use_cache=True), generated(small, ids(), use_cache=False))


def test_a_network_for_images_is_left_without_the_hooks_that_record_outputs() -> None:
    sizes = {
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 4, 4],
        "decoder_hidden_size": 16,
    }
    network: Any = made("SegformerForSemanticSegmentation", "SegformerConfig", **sizes, num_labels=3)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert compressed(network, pixel_values=images).report["params"]["ratio"] > 2
    assert not any(module._forward_hooks for module in network.modules())
