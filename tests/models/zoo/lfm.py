"""Tiny LFM2-VL and LFM3-VL: decoders with short convolutions between their layers of attention."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.models.tiny_families import (
    IMAGE_ID,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    Item,
    TinyFamily,
    pixels,
    qwen_image,
    text_config,
    vision_config,
)

SHAPES = ((8, 8), (4, 8), (8, 6))  # rows and columns of patches
MOST_PATCHES = 64


def lfm2_vl() -> Any:
    vision = {key: value for key, value in vision_config(patch_size=4).items() if key != "image_size"}
    config = transformers.Lfm2VlConfig(
        text_config=transformers.Lfm2Config(
            **text_config(layer_types=["conv", "full_attention", "conv"] * 2, block_multiple_of=32)
        ),
        vision_config=transformers.Siglip2VisionConfig(**vision, num_patches=16, vision_use_head=False),
        image_token_id=IMAGE_ID,
        projector_hidden_size=32,
        tie_word_embeddings=False,
    )
    return transformers.Lfm2VlForConditionalGeneration(config)


def lfm2_vl_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    rows, columns = SHAPES[number % len(SHAPES)]
    patches = rows * columns
    values = torch.zeros(1, MOST_PATCHES, 3 * 4 * 4)
    values[:, :patches] = pixels(generator, 1, patches, 3 * 4 * 4)
    return Item(
        [IMAGE_ID] * (patches // 4),
        {
            "pixel_values": values,
            "spatial_shapes": torch.tensor([[rows, columns]]),
            "pixel_attention_mask": (torch.arange(MOST_PATCHES) < patches).long()[None],
        },
    )


def lfm3_vl() -> Any:
    text = text_config(
        head_dim=16,
        layer_types=["conv", "full_attention", "sliding_attention"] * 2,
        sliding_window=500,
    )
    config = transformers.Lfm3VlConfig(
        text_config=transformers.Lfm3Config(**text),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "patch_size": 4,
            "layer_types": ["conv", "full_attention"],
            "initializer_range": 0.3,
        },
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
        projector_hidden_size=32,
        tie_word_embeddings=False,
    )
    return transformers.Lfm3VlForConditionalGeneration(config)


ZOO = {
    "Lfm2VlForConditionalGeneration": TinyFamily(lfm2_vl, lfm2_vl_image),
    "Lfm3VlForConditionalGeneration": TinyFamily(lfm3_vl, qwen_image),
}
