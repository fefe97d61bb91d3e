"""Tiny Qwen-VL models of every generation, Omni thinkers, and classes made after Qwen2-VL's pattern."""

from __future__ import annotations

from typing import Any

import transformers

from tests.models.tiny_families import (
    HIDDEN_SIZE,
    IMAGE_ID,
    TINY,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    TinyFamily,
    qwen2_5_vl_video,
    qwen3_vl_video,
    qwen_image,
    text_config,
)

MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
INTERLEAVED_MROPE = {"rope_type": "default", "mrope_section": [3, 3, 2], "mrope_interleaved": True}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": HIDDEN_SIZE,
    "initializer_range": 0.3,
}
EXPERTS = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
# two layers of linear attention before each of softmax attention; a quarter of the head turns: the sections add up to 4
LINEAR = {
    "initializer_range": 0.15,  # the recurrence amplifies rounding
    "head_dim": 32,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    },
}
IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "vision_start_token_id": VISION_START_ID,
    "vision_end_token_id": VISION_END_ID,
}


def qwen2_vl() -> Any:
    vision = {key: value for key, value in VISION.items() if key not in ("intermediate_size", "out_hidden_size")}
    config = transformers.Qwen2VLConfig(
        text_config=text_config(rope_parameters=MROPE),
        vision_config=vision | {"embed_dim": 32, "hidden_size": HIDDEN_SIZE},
        **IDS,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen3_vl_moe() -> Any:
    config = transformers.Qwen3VLMoeConfig(
        text_config=text_config(head_dim=16, rope_parameters=INTERLEAVED_MROPE, **EXPERTS),
        vision_config={**VISION, "depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        **IDS,
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def qwen3_5() -> Any:
    config = transformers.Qwen3_5Config(
        text_config=text_config(**LINEAR), vision_config={**VISION, "num_position_embeddings": 64}, **IDS
    )
    return transformers.Qwen3_5ForConditionalGeneration(config)


def qwen3_5_moe() -> Any:
    config = transformers.Qwen3_5MoeConfig(
        # experts amplify rounding, too
        text_config=text_config(**{**LINEAR, **EXPERTS, "initializer_range": 0.1}),
        vision_config={**VISION, "num_position_embeddings": 64},
        **IDS,
    )
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


def qwen4_exp() -> Any:
    """Linear and indexed attention, several residual streams, an embedding of n-grams in layer 1."""
    kinds = ["linear_attention", "linear_attention", "indexed_attention"] * 2
    text = text_config(
        **{**LINEAR, "layer_types": kinds},
        **EXPERTS,
        hc_count=2,
        hc_lowrank=8,
        ple_layer_ids=[1],
        ple_embed_dim=HIDDEN_SIZE,
        ngram_size=2,
        heads_per_ngram=2,
        ngram_vocab_size_base=50,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=1,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=16,
        indexer_compress_ratio=4,
    )
    config = transformers.Qwen4ExpConfig(
        text_config=text, vision_config={**VISION, "num_position_embeddings": 64}, **IDS
    )
    return transformers.Qwen4ExpForConditionalGeneration(config)


AUDIO = {
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "output_dim": HIDDEN_SIZE,
    "max_source_positions": 20,
}


def qwen2_5_omni() -> Any:
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=text_config(rope_parameters=MROPE),
        vision_config={**VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        audio_config={**AUDIO, "n_window": 4},
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        audio_token_index=94,
        audio_start_token_id=95,
        audio_end_token_id=96,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
        initializer_range=0.3,
    )
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)


def qwen3_omni_moe() -> Any:
    experts = {key: value for key, value in EXPERTS.items() if key != "shared_expert_intermediate_size"}
    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config=text_config(head_dim=16, rope_parameters=INTERLEAVED_MROPE, **experts),
        vision_config={**VISION, "depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        audio_config={**AUDIO, "n_window": 4, "downsample_hidden_size": 8},
        audio_token_id=94,
        audio_start_token_id=95,
        initializer_range=0.3,
        **IDS,
    )
    return transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config)


ZOO = {
    "Qwen2VLForConditionalGeneration": TinyFamily(qwen2_vl, qwen_image, qwen2_5_vl_video, is_qwen=True),
    "Qwen2_5_VLForConditionalGeneration": TINY["qwen2_5_vl"],
    "Qwen3VLForConditionalGeneration": TINY["qwen3_vl"],
    "Qwen3VLMoeForConditionalGeneration": TinyFamily(qwen3_vl_moe, qwen_image, qwen3_vl_video, is_qwen=True),
    "Qwen3_5ForConditionalGeneration": TinyFamily(qwen3_5, qwen_image, qwen3_vl_video, is_qwen=True),
    "Qwen3_5MoeForConditionalGeneration": TinyFamily(qwen3_5_moe, qwen_image, qwen3_vl_video, is_qwen=True),
    "Qwen4ExpForConditionalGeneration": TinyFamily(qwen4_exp, qwen_image, qwen3_vl_video, is_qwen=True),
    "Qwen2_5OmniThinkerForConditionalGeneration": TinyFamily(qwen2_5_omni, qwen_image),
    "Qwen3OmniMoeThinkerForConditionalGeneration": TinyFamily(qwen3_omni_moe, qwen_image, min_stage=2),
}
