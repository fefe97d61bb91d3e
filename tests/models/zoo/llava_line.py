"""Tiny models of the LLaVA line: the supported families' classes, LLaVA-NeXT-Video and ViP-LLaVA."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.models.tiny_families import (
    IMAGE_ID,
    PINPOINTS,
    TINY,
    VIDEO_ID,
    Item,
    TinyFamily,
    llava_image,
    llava_next_image,
    pixels,
    text_config,
    vision_config,
)


def llava_next_video() -> Any:
    config = transformers.LlavaNextVideoConfig(
        vision_config=transformers.CLIPVisionConfig(**vision_config(), projection_dim=32),
        text_config=transformers.LlamaConfig(**text_config(initializer_range=0.2)),
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    return transformers.LlavaNextVideoForConditionalGeneration(config)


def llava_next_video_video(number: int, generator: torch.Generator) -> Item:
    """Every frame's 16 patches are pooled to 4."""
    return Item([VIDEO_ID] * (3 * 4), {"pixel_values_videos": pixels(generator, 1, 3, 3, 32, 32)})


def vip_llava() -> Any:
    config = transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision_config(), projection_dim=32),
        text_config=transformers.LlamaConfig(**text_config()),
        image_token_index=IMAGE_ID,
        vision_feature_layer=[-1, 1],
        image_seq_length=16,
    )
    return transformers.VipLlavaForConditionalGeneration(config)


ZOO = {
    "LlavaForConditionalGeneration": TINY["llava"],
    "LlavaNextForConditionalGeneration": TINY["llava_next"],
    "LlavaOnevisionForConditionalGeneration": TINY["llava_onevision"],
    "VideoLlavaForConditionalGeneration": TINY["video_llava"],
    "LlavaNextVideoForConditionalGeneration": TinyFamily(llava_next_video, llava_next_image, llava_next_video_video),
    "VipLlavaForConditionalGeneration": TinyFamily(vip_llava, llava_image),
}
