"""LLaVA with other decoders: soft caps, sinks, windows, chunks, layers without rotary angles, layers with a state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.models.tiny_families import IMAGE_ID, TinyFamily, clip_config, llava_image, text_config

SLIDING, FULL = "sliding_attention", "full_attention"
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
# these decoders' rounding errors grow most
SMALLER = {"initializer_range": 0.2}
EAGER_ALONE = ("gemma2", "gpt_oss")


def with_decoder(make_config: Callable[[], Any]) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = {key: value for key, value in clip_config().items() if key != "model_type"}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=make_config(),
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def config_of(name: str, **changes: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**text_config(**changes))


def window(tokens: int = 500) -> dict[str, Any]:
    return {"sliding_window": tokens, "layer_types": [SLIDING, SLIDING, FULL] * 2}


MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}

DECODERS: dict[str, Callable[[], Any]] = {
    "gemma2": partial(config_of, "Gemma2Config", head_dim=16, query_pre_attn_scalar=16, **window()),
    # soft caps of scores and logits low enough to matter
    "gemma2_low_caps": partial(
        config_of,
        "Gemma2Config",
        head_dim=16,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        **window(),
    ),
    "gpt_oss": partial(config_of, "GptOssConfig", head_dim=16, **SMALLER, **EXPERTS, **window()),
    "stablelm": partial(config_of, "StableLmConfig", partial_rotary_factor=0.5),
    "nemotron": partial(config_of, "NemotronConfig", head_dim=16),
    "gpt_neox": partial(config_of, "GPTNeoXConfig"),
    "cohere2": partial(config_of, "Cohere2Config", logit_scale=1.0, **window()),
    "smollm3": partial(config_of, "SmolLM3Config", no_rope_layers=[1, 1, 0] * 2),
    "ministral3": partial(config_of, "Ministral3Config", head_dim=16),
    "mistral_with_a_window": partial(config_of, "MistralConfig", sliding_window=8),
    "qwen3_next": partial(
        config_of,
        "Qwen3NextConfig",
        head_dim=16,
        layer_types=["linear_attention", "linear_attention", FULL] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        initializer_range=0.1,
    ),
    "lfm2": partial(config_of, "Lfm2Config", layer_types=["conv", "conv", FULL] * 2),
    "bamba": partial(config_of, "BambaConfig", attn_layer_indices=[2, 5], **MAMBA),
    "falcon_h1": partial(config_of, "FalconH1Config", mamba_d_ssm=128, head_dim=16, **SMALLER, **MAMBA),
    "granitemoehybrid": partial(
        config_of,
        "GraniteMoeHybridConfig",
        layer_types=["mamba", "mamba", "attention"] * 2,
        shared_intermediate_size=32,
        attention_multiplier=0.25,
        **EXPERTS,
        **MAMBA,
    ),
    # the prompts are longer than a chunk
    "llama4_text": partial(
        config_of,
        "Llama4TextConfig",
        head_dim=16,
        intermediate_size_mlp=32,
        attention_chunk_size=8,
        no_rope_layers=[1, 1, 0] * 2,
        **EXPERTS,
    ),
}

ZOO = {
    f"LlavaForConditionalGeneration+{name}": TinyFamily(
        partial(with_decoder, make_config),
        llava_image,
        attn_implementation="eager" if name.startswith(EAGER_ALONE) else "sdpa",
    )
    for name, make_config in DECODERS.items()
}
