"""Tiny models whose images are patches with a grid, of any size: Kimi, PaddleOCR-VL, VideoLLaMA 3 and others."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.models.tiny_families import (
    GRIDS,
    IMAGE_ID,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    Item,
    TinyFamily,
    pixels,
    text_config,
    vision_config,
)


def grid_image(*patch: int, **more: Any):
    """Make images of a varying grid whose patches have the shape ``patch``; ``more`` are tensors of every image."""

    def image(number: int, alone: bool, generator: torch.Generator) -> Item:
        grid = GRIDS[number % len(GRIDS)]
        ids = [VISION_START_ID] + [IMAGE_ID] * (grid[1] * grid[2] // 4) + [VISION_END_ID]
        values = pixels(generator, grid[1] * grid[2], *patch)
        return Item(ids, {"pixel_values": values, "image_grid_thw": torch.tensor([grid]), **more})

    return image


IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "vision_start_token_id": VISION_START_ID,
    "vision_end_token_id": VISION_END_ID,
}


def kimi_k25() -> Any:
    """Latent keys and values; layer 0 is dense, the others have experts."""
    text = text_config(
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        rope_interleave=True,
    )
    vision = {key: value for key, value in vision_config(patch_size=4).items() if key != "image_size"}
    config = transformers.Kimi_K25Config(
        text_config=transformers.DeepseekV3Config(**text),
        vision_config={**vision, "pos_emb_height": 8, "pos_emb_width": 8, "initializer_range": 0.3},
        projection_hidden_size=32,
        tie_word_embeddings=False,
        **IDS,
    )
    return transformers.Kimi_K25ForConditionalGeneration(config)


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


ZOO = {
    "Kimi_K25ForConditionalGeneration": TinyFamily(kimi_k25, grid_image(3, 4, 4)),
    "PaddleOCRVLForConditionalGeneration": TinyFamily(paddleocr_vl, grid_image(3, 4, 4), is_qwen=True),
    "VideoLlama3ForConditionalGeneration": TinyFamily(
        video_llama_3, grid_image(3 * 4 * 4, image_merge_sizes=torch.tensor([2]))
    ),
}
