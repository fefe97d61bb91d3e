"""Tiny models whose images are one or more tiles of one size, each with the same number of tokens."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.models.tiny_families import (
    HIDDEN_SIZE,
    IMAGE_ID,
    VISION_END_ID,
    VISION_START_ID,
    Item,
    Rows,
    TinyFamily,
    pixels,
    text_config,
    vision_config,
)


def tiles_of(tokens: int):
    """Make images of one and two tiles in turn, ``tokens`` a tile."""

    def image(number: int, alone: bool, generator: torch.Generator) -> Item:
        tiles = 1 + number % 2
        ids = [VISION_START_ID, *[IMAGE_ID] * (tokens * tiles), VISION_END_ID]
        return Item(ids, {"pixel_values": pixels(generator, tiles, 3, 32, 32)})

    return image


def llama4() -> Any:
    """Layers 3 has no rotary; every second layer has experts."""
    text = text_config(
        head_dim=16, intermediate_size_mlp=128, num_local_experts=4, interleave_moe_layer_step=2, attn_scale=0.1
    )
    vision = vision_config(
        patch_size=4,
        intermediate_size=128,
        vision_output_dim=32,
        projector_input_dim=32,
        projector_output_dim=32,
        initializer_range=0.3,
    )
    config = transformers.Llama4Config(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_ID,
        boi_token_index=VISION_START_ID,
        eoi_token_index=VISION_END_ID,
    )
    return transformers.Llama4ForConditionalGeneration(config)


def molmo2() -> Any:
    """Tokens of a row's images see each other; each is pooled from four patches of one tile."""
    vision = {key: value for key, value in vision_config(patch_size=4).items() if key != "image_size"}
    sizes = {"head_dim": 16, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = transformers.Molmo2Config(
        text_config=text_config(head_dim=16, additional_vocab_size=8),
        vision_config={**vision, **sizes, "num_position_embeddings": 64},
        adapter_config={
            **sizes,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "text_hidden_size": HIDDEN_SIZE,
            "vision_feature_layer": [0, 1],
        },
        image_patch_id=IMAGE_ID,
        image_start_token_id=VISION_START_ID,
        image_end_token_id=VISION_END_ID,
        low_res_image_start_token_id=94,
        frame_start_token_id=95,
        frame_end_token_id=96,
        initializer_range=0.3,
    )
    return transformers.Molmo2ForConditionalGeneration(config)


def molmo2_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    """A coarse tile in 4 x 4 tokens and a fine one in 4 x 2 or 4 x 4."""
    columns = (2, 4)[number % 2]
    patches = torch.arange(128).view(2, 4, 2, 4, 2).transpose(2, 3)  # [tile, row, column, 2, 2]
    pooling = torch.cat([patches[0].reshape(16, 4), patches[1, :, :columns].reshape(4 * columns, 4)])
    return Item(
        [VISION_START_ID, *[IMAGE_ID] * len(pooling), VISION_END_ID],
        {
            "pixel_values": pixels(generator, 2, 64, 3 * 4 * 4),
            "image_token_pooling": pooling,
            "image_grids": torch.tensor([[4, 4, 4, columns]]),
            "image_num_crops": torch.tensor([2]),
        },
    )


def molmo2_finish(inputs: dict[str, torch.Tensor], rows: Rows) -> dict[str, torch.Tensor]:
    """Number the patches of all images of the batch in one sequence."""
    if "image_grids" in inputs:
        grids = inputs["image_grids"]
        tokens = grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]
        inputs["image_token_pooling"] = inputs["image_token_pooling"] + torch.repeat_interleave(
            128 * torch.arange(len(grids)), tokens
        ).unsqueeze(1)
    return inputs


ZOO = {
    "Llama4ForConditionalGeneration": TinyFamily(llama4, tiles_of(16)),
    "Molmo2ForConditionalGeneration": TinyFamily(molmo2, molmo2_image, is_qwen=True, finish=molmo2_finish),
}
