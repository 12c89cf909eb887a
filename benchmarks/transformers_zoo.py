"""Networks of transformers from their configurations: small sizes, real structure, random weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 200,
}
GROUPED = {**TEXT, "num_key_value_heads": 4, "pad_token_id": 0}
PICTURE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8,
    "image_size": 64, "patch_size": 16, "num_labels": 7,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How to make a network.

    Attributes:
        model: Name of its class in transformers.
        config: Name of the class of its configuration.
        sizes: What the configuration is given.
        inputs: Makes example inputs.
        only: The outputs that matter, where the network has others as well; those are an interface and never shrink.
    """

    model: str
    config: str
    sizes: Mapping[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    only: str | tuple[str, ...] = ()


class Only(nn.Module):
    """A network that gives back some of its outputs: what nobody asks for can shrink."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns the outputs that matter."""
        output = self.network(**inputs)
        return tuple(output[name] for name in self.names)


def ids(length: int = 12, name: str = "input_ids") -> Callable[[], dict[str, Tensor]]:
    """Token ids with an attention mask that hides nothing."""
    return lambda: {
        name: torch.randint(3, 200, (2, length)),
        "attention_mask": torch.ones(2, length, dtype=torch.int64),
    }


def both() -> dict[str, Tensor]:
    """Token ids for an encoder and for a decoder."""
    return {"input_ids": torch.randint(3, 200, (2, 12)), "decoder_input_ids": torch.randint(3, 200, (2, 9))}


def pixels(size: int = 64) -> Callable[[], dict[str, Tensor]]:
    """Images."""
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def captioned() -> dict[str, Tensor]:
    """Images with texts."""
    return {**ids()(), **pixels()()}


def spectrogram() -> dict[str, Tensor]:
    """Log-mel spectrograms and what has been said so far."""
    return {"input_features": torch.randn(2, 16, 60), "decoder_input_ids": torch.randint(3, 200, (2, 9))}


def sound() -> dict[str, Tensor]:
    """Waves."""
    return {"input_values": torch.randn(2, 2000)}


def prompted() -> dict[str, Tensor]:
    """Images with one point each."""
    return {"pixel_values": torch.randn(2, 3, 64, 64), "input_points": torch.rand(2, 1, 1, 2) * 64}


BART = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 200,
}  # fmt: skip
MARIAN = {**BART, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": 2}
RESIDUAL = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
T5 = {
    "d_model": 64,
    "d_kv": 8,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 8,
    "vocab_size": 200,
    "decoder_start_token_id": 0,
}
SPEECH = {
    **TEXT, "conv_dim": [32] * 3, "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2], "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 30,
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}

RECIPES: Mapping[str, Recipe] = {
    "bert": Recipe("BertForSequenceClassification", "BertConfig", TEXT, ids()),
    "bert_mlm": Recipe("BertForMaskedLM", "BertConfig", TEXT, ids()),
    "distilbert": Recipe(
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"dim": 64, "hidden_dim": 128, "n_layers": 3, "n_heads": 8, "vocab_size": 200}, ids(),
    ),
    "roberta": Recipe("RobertaForSequenceClassification", "RobertaConfig", TEXT, ids()),
    "albert": Recipe("AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 32}, ids()),
    "electra": Recipe("ElectraForSequenceClassification", "ElectraConfig", {**TEXT, "embedding_size": 32}, ids()),
    "deberta": Recipe(
        "DebertaForSequenceClassification", "DebertaConfig",
        {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 64}, ids(),
    ),
    "deberta_v2": Recipe(
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16, "share_att_key": True}, ids(),
    ),
    "gpt2": Recipe("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 8, "vocab_size": 200, "n_positions": 64}, ids()),
    "opt": Recipe("OPTForCausalLM", "OPTConfig", {**TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64}, ids()),
    "llama": Recipe("LlamaForCausalLM", "LlamaConfig", GROUPED, ids()),
    "mistral": Recipe("MistralForCausalLM", "MistralConfig", GROUPED, ids()),
    "qwen2": Recipe("Qwen2ForCausalLM", "Qwen2Config", GROUPED, ids()),
    "qwen3": Recipe("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}, ids()),
    "gemma": Recipe("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}, ids()),
    "gemma2": Recipe("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 8}, ids()),
    "gemma3": Recipe("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 8}, ids()),
    "phi": Recipe("PhiForCausalLM", "PhiConfig", GROUPED, ids()),
    "phi3": Recipe("Phi3ForCausalLM", "Phi3Config", GROUPED, ids()),
    "falcon": Recipe("FalconForCausalLM", "FalconConfig", {**TEXT, "multi_query": True, "new_decoder_architecture": False}, ids()),
    "gpt_neox": Recipe("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, ids()),
    "bloom": Recipe("BloomForCausalLM", "BloomConfig", {"hidden_size": 64, "n_layer": 3, "n_head": 8, "vocab_size": 200}, ids()),
    "t5": Recipe("T5ForConditionalGeneration", "T5Config", T5, both, only="logits"),
    "t5_gated": Recipe(
        "T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, both, only="logits"
    ),
    "mbart": Recipe("MBartForConditionalGeneration", "MBartConfig", BART, both, only="logits"),
    "marian": Recipe("MarianMTModel", "MarianConfig", MARIAN, both, only="logits"),
    "bart": Recipe("BartForConditionalGeneration", "BartConfig", BART, both, only="logits"),
    "whisper": Recipe(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {**BART, "num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 32, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}, spectrogram, only="logits",
    ),
    "vit": Recipe("ViTForImageClassification", "ViTConfig", PICTURE, pixels()),
    "deit": Recipe("DeiTForImageClassificationWithTeacher", "DeiTConfig", PICTURE, pixels()),
    "swin": Recipe(
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 7}, pixels(),
    ),
    "swinv2": Recipe(
        "Swinv2ForImageClassification", "Swinv2Config",
        {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 7}, pixels(),
    ),
    "segformer": Recipe(
        "SegformerForSemanticSegmentation", "SegformerConfig",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4], "decoder_hidden_size": 32, "num_labels": 7},
        pixels(),
    ),
    "convnext": Recipe(
        "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "num_labels": 7, "image_size": 64}, pixels(),
    ),
    "detr": Recipe(
        "DetrForObjectDetection", "DetrConfig",
        {**BART, "num_queries": 10, "num_labels": 7, "use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False,
         "backbone_config": ("ResNetConfig", {**RESIDUAL, "out_features": ["stage4"]})},
        pixels(), only=("logits", "pred_boxes"),
    ),
    "resnet": Recipe("ResNetForImageClassification", "ResNetConfig", {**RESIDUAL, "num_labels": 7}, pixels()),
    "regnet": Recipe("RegNetForImageClassification", "RegNetConfig", {**RESIDUAL, "groups_width": 8, "num_labels": 7}, pixels()),
    "dinov2": Recipe("Dinov2ForImageClassification", "Dinov2Config", PICTURE, pixels()),
    "mobilevit": Recipe(
        "MobileViTForImageClassification", "MobileViTConfig",
        {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [16, 16, 24, 32, 48, 48, 64], "num_attention_heads": 4, "image_size": 64, "num_labels": 7},
        pixels(),
    ),
    "clip": Recipe(
        "CLIPModel", "CLIPConfig",
        {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": {k: v for k, v in PICTURE.items() if k != "num_labels"}, "projection_dim": 32},
        captioned, only=("logits_per_text", "logits_per_image"),
    ),
    "siglip": Recipe(
        "SiglipModel", "SiglipConfig",
        {"text_config": {**TEXT, "max_position_embeddings": 12}, "vision_config": {k: v for k, v in PICTURE.items() if k != "num_labels"}},
        captioned, only=("logits_per_text", "logits_per_image"),
    ),
    "wav2vec2": Recipe("Wav2Vec2ForCTC", "Wav2Vec2Config", {**SPEECH, "apply_spec_augment": False}, sound),
    "hubert": Recipe("HubertForCTC", "HubertConfig", {**SPEECH, "apply_spec_augment": False}, sound),
    "sam": Recipe(
        "SamModel", "SamConfig",
        {
            "vision_config": {
                "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 8, "window_size": 4,
                "output_channels": 32, "global_attn_indexes": [1], "mlp_dim": 64, "num_pos_feats": 16,
            },
            "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 8},
            "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
        },
        prompted,
    ),
    "qwen2_moe": Recipe("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**GROUPED, **EXPERTS}, ids()),
    "llama_tied": Recipe("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}, ids()),
    "gpt2_scaled": Recipe(
        "GPT2LMHeadModel", "GPT2Config",
        {"n_embd": 64, "n_layer": 3, "n_head": 8, "vocab_size": 200, "n_positions": 64, "reorder_and_upcast_attn": True,
         "scale_attn_by_inverse_layer_idx": True}, ids(),
    ),
    "gpt_neox_serial": Recipe("GPTNeoXForCausalLM", "GPTNeoXConfig", {**TEXT, "use_parallel_residual": False}, ids()),
    "falcon_new": Recipe("FalconForCausalLM", "FalconConfig", {**TEXT, "new_decoder_architecture": True, "num_kv_heads": 4}, ids()),
    "mamba": Recipe("MambaForCausalLM", "MambaConfig", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 200}, ids()),
    "mixtral": Recipe("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}, ids()),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Returns a network with random weights and keyword inputs for it."""
    import transformers

    recipe = RECIPES[name]
    torch.manual_seed(0)
    sizes = {name: _made(value) if isinstance(value, tuple) else value for name, value in recipe.sizes.items()}
    config = getattr(transformers, recipe.config)(**sizes)
    config.use_cache = False
    network = getattr(transformers, recipe.model)(config).eval()
    names = (recipe.only,) if isinstance(recipe.only, str) else recipe.only
    return Only(network, names).eval() if names else network, recipe.inputs()


def _made(value: tuple[str, Mapping[str, Any]]) -> Any:
    import transformers

    name, sizes = value
    return getattr(transformers, name)(**sizes)
