"""GLM-4V and its kin: any grid of patches, 2x2 merged, M-RoPE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.tiny_families import (
    FIRST_WORD,
    HIDDEN_SIZE,
    IMAGE_ID,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    Item,
    Rows,
    TinyFamily,
    qwen3_vl_video,
    qwen_image,
    text_config,
)

VIDEO_START_ID, VIDEO_END_ID = 94, 95
IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "image_start_token_id": VISION_START_ID,
    "image_end_token_id": VISION_END_ID,
    "video_start_token_id": VIDEO_START_ID,
    "video_end_token_id": VIDEO_END_ID,
}
TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "out_hidden_size": HIDDEN_SIZE,
    "initializer_range": 0.3,
}


def glm_text(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5, "rope_theta": 10000.0}
    # four norms in a layer amplify rounding: with wider weights bfloat16 alone, unpruned, is off by a quarter
    return text_config(rope_parameters=rope, **{"initializer_range": 0.2, **changes})


def glm4v():
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    return Glm4vForConditionalGeneration(Glm4vConfig(text_config=glm_text(), vision_config=dict(TOWER), **IDS))


def glm46v():
    from transformers import Glm4vTextConfig, Glm4vVisionConfig, Glm46VConfig, Glm46VForConditionalGeneration

    config = Glm46VConfig(text_config=Glm4vTextConfig(**glm_text()), vision_config=Glm4vVisionConfig(**TOWER), **IDS)
    return Glm46VForConditionalGeneration(config)


def glm4v_moe():
    from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

    text = glm_text(moe_intermediate_size=32, num_experts_per_tok=2, n_routed_experts=4, first_k_dense_replace=1)
    return Glm4vMoeForConditionalGeneration(Glm4vMoeConfig(text_config=text, vision_config=dict(TOWER), **IDS))


def glm_ocr():
    from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

    config = GlmOcrConfig(text_config=glm_text(head_dim=16), vision_config=dict(TOWER), **IDS)
    return GlmOcrForConditionalGeneration(config)


def glm_video(number: int, generator: torch.Generator) -> Item:
    """Every frame is an image before its time stamp, and the marks of the video stand around all."""
    item = qwen3_vl_video(number, generator)
    frames = [IMAGE_ID if token == VIDEO_ID else token for token in item.ids]
    return Item([VIDEO_START_ID, *frames[1:], FIRST_WORD, VIDEO_END_ID], item.tensors)


def with_types(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Tell frames of videos from images by the marks, as the processor does."""
    ids = inputs["input_ids"]
    in_video = (ids == VIDEO_START_ID).cumsum(1) > (ids == VIDEO_END_ID).cumsum(1)
    return inputs | {"mm_token_type_ids": (ids == IMAGE_ID).int() * (1 + in_video.int())}


BOTH: dict[str, Any] = {"finish": with_types, "mixes": False, "repeats_images": False}
ZOO = {
    "Glm4vForConditionalGeneration": TinyFamily(glm4v, qwen_image, glm_video, **BOTH),
    "Glm46VForConditionalGeneration": TinyFamily(glm46v, qwen_image, glm_video, **BOTH),
    "Glm4vMoeForConditionalGeneration": TinyFamily(glm4v_moe, qwen_image, glm_video, **BOTH),
    "GlmOcrForConditionalGeneration": TinyFamily(glm_ocr, qwen_image, glm_video, **BOTH),
}
