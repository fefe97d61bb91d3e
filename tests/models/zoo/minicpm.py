"""Tiny MiniCPM-V and MiniCPM-OCR: patches of all images in one long strip, decoders with linear attention."""

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
    Rows,
    TinyFamily,
    pixels,
    text_config,
    vision_config,
)
from tests.models.zoo.qwen import LINEAR

SHARED = {"insert_layer_id": 0, "image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID}


def parts() -> dict[str, Any]:
    return {
        "text_config": transformers.Qwen3_5TextConfig(**text_config(**LINEAR)),
        "vision_config": vision_config(patch_size=4, initializer_range=0.3),
        **SHARED,
    }


def minicpmv4_6() -> Any:
    return transformers.MiniCPMV4_6ForConditionalGeneration(transformers.MiniCPMV4_6Config(**parts()))


def minicpmv4_7() -> Any:
    config = transformers.MiniCPMV4_7Config(
        **parts(),
        image_start_id=VISION_START_ID,
        image_end_id=VISION_END_ID,
        slice_start_id=94,
        slice_end_id=95,
        newline_id=96,
    )
    return transformers.MiniCPMV4_7ForConditionalGeneration(config)


def minicpm_ocr() -> Any:
    config = transformers.MiniCPMOcrConfig(**parts(), tie_word_embeddings=False)
    return transformers.MiniCPMOcrForConditionalGeneration(config)


def minicpm_image(patches_a_token: int):
    def image(number: int, alone: bool, generator: torch.Generator) -> Item:
        _, height, width = GRIDS[number % len(GRIDS)]
        ids = [VISION_START_ID] + [IMAGE_ID] * (height * width // patches_a_token) + [VISION_END_ID]
        values = pixels(generator, height * width, 3, 4, 4)
        return Item(ids, {"pixel_values": values, "target_sizes": torch.tensor([[height, width]])})

    return image


def strip(inputs: dict[str, torch.Tensor], rows: Rows) -> dict[str, torch.Tensor]:
    """Lay the patches side by side."""
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].permute(1, 2, 0, 3).reshape(1, 3, 4, -1)
    return inputs


ZOO = {
    "MiniCPMV4_6ForConditionalGeneration": TinyFamily(minicpmv4_6, minicpm_image(16), finish=strip),
    "MiniCPMV4_7ForConditionalGeneration": TinyFamily(minicpmv4_7, minicpm_image(16), is_qwen=True, finish=strip),
    "MiniCPMOcrForConditionalGeneration": TinyFamily(minicpm_ocr, minicpm_image(4), finish=strip),
}
