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
        "text_config": transformers.Qwen3_5TextConfig(**text_config(**{**LINEAR, "initializer_range": 0.1})),
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


def minicpm_image(patches_a_token: int, scale: int = 2):
    def image(number: int, alone: bool, generator: torch.Generator) -> Item:
        _, *sides = GRIDS[number % len(GRIDS)]
        height, width = (scale * side for side in sides)
        ids = [VISION_START_ID] + [IMAGE_ID] * (height * width // patches_a_token) + [VISION_END_ID]
        values = pixels(generator, height * width, 3, 4, 4)
        return Item(ids, {"pixel_values": values, "target_sizes": torch.tensor([[height, width]])})

    return image


def minicpm_video(number: int, generator: torch.Generator) -> Item:
    """Two frames of one size."""
    ids, frames = [], [minicpm_image(16, 1)(number, False, generator) for _ in range(2)]
    for item in frames:
        ids += [VIDEO_ID if token == IMAGE_ID else token for token in item.ids]
    tensors = {name: torch.cat([item.tensors[name] for item in frames]) for name in ("pixel_values", "target_sizes")}
    return Item(ids, {"pixel_values_videos": tensors["pixel_values"], "target_sizes_videos": tensors["target_sizes"]})


def strip(inputs: dict[str, torch.Tensor], rows: Rows) -> dict[str, torch.Tensor]:
    """Lay the patches side by side."""
    for name in inputs.keys() & {"pixel_values", "pixel_values_videos"}:
        inputs[name] = inputs[name].permute(1, 2, 0, 3).reshape(1, 3, 4, -1)
    return inputs


ZOO = {
    "MiniCPMV4_6ForConditionalGeneration": TinyFamily(minicpmv4_6, minicpm_image(16), minicpm_video, finish=strip),
    "MiniCPMV4_7ForConditionalGeneration": TinyFamily(minicpmv4_7, minicpm_image(16), is_qwen=True, finish=strip),
    "MiniCPMOcrForConditionalGeneration": TinyFamily(minicpm_ocr, minicpm_image(4), finish=strip),
}
