"""Tiny models whose images are patches with a grid, of any size: PaddleOCR-VL, VideoLLaMA 3, MiniMax M3, Muse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from tests.models.tiny_families import (
    GRIDS,
    HIDDEN_SIZE,
    IMAGE_ID,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    Item,
    Rows,
    TinyFamily,
    pixels,
    qwen_image,
    text_config,
    vision_config,
)
from tests.models.zoo.structures import grid_image

IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "vision_start_token_id": VISION_START_ID,
    "vision_end_token_id": VISION_END_ID,
}


def paddleocr_vl() -> Any:
    config = transformers.PaddleOCRVLConfig(
        text_config=text_config(head_dim=16, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]}),
        vision_config=vision_config(patch_size=4, initializer_range=0.3),
        tie_word_embeddings=False,
        **IDS,
    )
    return transformers.PaddleOCRVLForConditionalGeneration(config)


def video_llama_3() -> Any:
    vision = {key: value for key, value in vision_config(patch_size=4).items() if key != "image_size"}
    config = transformers.VideoLlama3Config(
        text_config=transformers.Qwen2Config(**text_config()),
        vision_config={**vision, "initializer_range": 0.3},
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
    )
    return transformers.VideoLlama3ForConditionalGeneration(config)


def merged_by_two(inputs: dict[str, torch.Tensor], rows: Rows) -> dict[str, torch.Tensor]:
    if "image_grid_thw" in inputs:
        inputs["image_merge_sizes"] = torch.full((len(inputs["image_grid_thw"]),), 2)
    return inputs


def minimax_m3_vl(kinds: Sequence[str] = ("full_attention", "full_attention", "minimax_m3_sparse")) -> Any:
    """Every third layer attends to the best blocks of keys alone; layers 0 and 1 are dense, the others have experts."""
    vision = {key: value for key, value in vision_config(patch_size=4).items() if key != "num_attention_heads"}
    config = transformers.MiniMaxM3VLConfig(
        text_config=text_config(
            head_dim=16,
            rotary_dim=8,
            dense_intermediate_size=128,
            shared_intermediate_size=32,
            intermediate_size=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            mlp_layer_types=["dense"] * 2 + ["sparse"] * 4,
            layer_types=[*kinds] * 2,
            index_n_heads=2,
            index_head_dim=16,
            index_block_size=8,
            index_topk_blocks=2,
        ),
        vision_config={**vision, "num_attention_heads": 1, "initializer_range": 0.3},
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        projector_hidden_size=32,
    )
    return transformers.MiniMaxM3SparseForConditionalGeneration(config)


MUSE_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "max_position_embeddings": 64,
}
MUSE = {
    "vision_config": MUSE_VISION,
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "out_hidden_size": 128,
    "projector_hidden_size": 32,
}


def muse_glimmer() -> Any:
    """Layers 1 and 5 attend to everything, without rotary; the others have a window."""
    config = transformers.MuseGlimmerConfig(text_config=text_config(head_dim=16, sliding_window=500), **MUSE)
    return transformers.MuseGlimmerForConditionalGeneration(config)


def muse_spark() -> Any:
    text = text_config(
        head_dim=16,
        sliding_window=500,
        moe_intermediate_size=32,
        moe_hidden_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    audio = {"patch_sizes": [4, 2], "hidden_sizes": [8, 16], "depths": [1, 1], "num_hidden_layers": 2}
    config = transformers.MuseSparkConfig(
        text_config=text, audio_config={**audio, "out_hidden_size": HIDDEN_SIZE}, audio_token_id=94, **MUSE
    )
    return transformers.MuseSparkForConditionalGeneration(config)


def nemotron_h_omni() -> Any:
    """Mamba, attention and feed-forward parts are layers of their own."""
    text = text_config(
        head_dim=16,
        layer_types=["linear_attention", "full_attention", "moe", "linear_attention", "full_attention", "mlp"],
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        expand=1,
        chunk_size=16,
        use_mamba_kernels=False,
        n_routed_experts=4,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        rescale_prenorm_residual=False,
    )
    vision = {key: value for key, value in vision_config(patch_size=4).items() if key != "intermediate_size"}
    config = transformers.NemotronH_Omni_Reasoning_V3_Config(
        text_config=transformers.NemotronHConfig(**text),
        vision_config=transformers.RadioConfig(
            **vision,
            mlp_ratio=2.0,
            max_img_size=64,
            num_cls_tokens=1,
            num_registers=1,
            summary_idxs=[0],
            video_temporal_patch_size=2,
            initializer_range=0.3,
            dtype="float32",
        ),
        projector_hidden_size=32,
        vision_hidden_size=32,
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        audio_token_id=94,
    )
    return transformers.NemotronH_Omni_Reasoning_V3(config)


def nemotron_h_omni_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    _, height, width = GRIDS[number % len(GRIDS)]
    ids = [VISION_START_ID] + [IMAGE_ID] * (height * width // 4) + [VISION_END_ID]
    values = pixels(generator, height * width, 3 * 4 * 4)
    return Item(ids, {"pixel_values": values, "image_grid_hw": torch.tensor([[height, width]])})


ZOO = {
    "PaddleOCRVLForConditionalGeneration": TinyFamily(paddleocr_vl, grid_image(3, 4, 4), is_qwen=True),
    "VideoLlama3ForConditionalGeneration": TinyFamily(video_llama_3, grid_image(3 * 4 * 4), finish=merged_by_two),
    "MiniMaxM3SparseForConditionalGeneration": TinyFamily(
        minimax_m3_vl,
        qwen_image,
        limits_itself="blocks of keys are counted in slots of the batch: a left-padded row's logits differ from those "
        "of the row alone, and between eager and sdpa, by up to 3; generate(), which counts positions from the first "
        "token, chooses another next token than forward()",
    ),
    "MiniMaxM3SparseForConditionalGeneration+full": TinyFamily(
        lambda: minimax_m3_vl(["full_attention"] * 3), qwen_image
    ),
    "MuseGlimmerForConditionalGeneration": TinyFamily(muse_glimmer, qwen_image),
    "NemotronH_Omni_Reasoning_V3": TinyFamily(nemotron_h_omni, nemotron_h_omni_image),
    "MuseSparkForConditionalGeneration": TinyFamily(muse_spark, qwen_image),
}
