"""Classes that see any grid of patches, 2x2 merged, as Qwen2.5-VL and Qwen3-VL do; most turn by M-RoPE."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.tiny_families import (
    GRIDS,
    HIDDEN_SIZE,
    IMAGE_ID,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    Item,
    TinyFamily,
    pixels,
    qwen2_5_vl_video,
    qwen3_vl_video,
    qwen_image,
    text_config,
)

IDS = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID}
MARKS = {"vision_start_token_id": VISION_START_ID, "vision_end_token_id": VISION_END_ID}
VIDEO_START_ID, VIDEO_END_ID = 94, 95


def tower(**changes: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": HIDDEN_SIZE,
        **changes,
    }


def mrope(*sections: int, **changes: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **changes}


def patches_of(channels: int):
    """Make images of other grids in turn, ``channels`` values a patch."""

    def image(number: int, alone: bool, generator: torch.Generator) -> Item:
        grid = GRIDS[number % len(GRIDS)]
        ids = [VISION_START_ID, *[IMAGE_ID] * (grid[1] * grid[2] // 4), VISION_END_ID]
        values = pixels(generator, grid[1] * grid[2], channels)
        return Item(ids, {"pixel_values": values, "image_grid_thw": torch.tensor([grid])})

    return image


def exaone4_5():
    """Build with no rotary angles in every third layer, and a window longer than the prompts."""
    from transformers import Exaone4_5_Config, Exaone4_5_ForConditionalGeneration, Exaone4Config

    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Exaone4_5_Config(
        text_config=Exaone4Config(**text_config(sliding_window=500, layer_types=kinds)),
        vision_config=tower(window_size=16, fullatt_block_indexes=[1], num_key_value_heads=1),
        **IDS,
    )
    return Exaone4_5_ForConditionalGeneration(config)


def cohere_compass():
    from transformers import CohereCompassConfig, CohereCompassForConditionalGeneration

    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    rope = {"full_attention": mrope(3, 3, 2), "sliding_attention": mrope(3, 3, 2)}
    config = CohereCompassConfig(
        text_config=text_config(rope_parameters=rope, sliding_window=500, layer_types=kinds, logit_scale=1.0),
        vision_config=tower(depth=3, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        **IDS,
        **MARKS,
    )
    return CohereCompassForConditionalGeneration(config)


def cosmos3_edge():
    from transformers import Cosmos3EdgeConfig, Cosmos3EdgeForConditionalGeneration

    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "num_patches": 64,
    }
    config = Cosmos3EdgeConfig(
        text_config=text_config(head_dim=16, rope_parameters=mrope(4, 2, 2)),
        vision_config=vision,
        projector_hidden_size=64,
        **IDS,
        **MARKS,
    )
    return Cosmos3EdgeForConditionalGeneration(config)


def ernie4_5_vl_moe():
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    config = Ernie4_5_VLMoeConfig(
        text_config=text_config(
            moe_intermediate_size=[32, 16],
            moe_k=2,
            moe_num_experts=4,
            moe_num_shared_experts=1,
            rope_parameters=mrope(3, 3, 2),
        ),
        vision_config={**tower(), "spatial_merge_size": 2},
        image_start_token_id=VISION_START_ID,
        image_end_token_id=VISION_END_ID,
        video_start_token_id=VIDEO_START_ID,
        video_end_token_id=VIDEO_END_ID,
        **IDS,
    )
    return Ernie4_5_VLMoeForConditionalGeneration(config)


def hunyuan_vl():
    from transformers import HunYuanVLConfig, HunYuanVLForConditionalGeneration

    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "out_hidden_size": HIDDEN_SIZE,
        "max_image_size": 64,
        "min_image_size": 16,
        "img_max_token_num": 64,
        "max_vit_seq_len": 256,
    }
    config = HunYuanVLConfig(
        text_config=text_config(head_dim=16, rope_parameters=mrope(2, 2, 2, 2)),
        vision_config=vision,
        image_token_id=IMAGE_ID,
        im_start_id=VISION_START_ID,
        im_end_id=VISION_END_ID,
        im_newline_id=94,
    )
    return HunYuanVLForConditionalGeneration(config)


def hunyuan_vl_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    """Make an image with a feature before it, one at the end of each of its rows, and one after it."""
    item = patches_of(3 * 4 * 4)(number, alone, generator)
    _, height, width = GRIDS[number % len(GRIDS)]
    tokens = (height // 2) * (width // 2 + 1) + 2
    return Item([VISION_START_ID, *[IMAGE_ID] * tokens, VISION_END_ID], item.tensors)


def hyperclovax():
    from transformers import (
        HyperCLOVAXConfig,
        HyperCLOVAXVisionV2Config,
        HyperCLOVAXVisionV2ForConditionalGeneration,
    )
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    config = HyperCLOVAXVisionV2Config(
        text_config=HyperCLOVAXConfig(**text_config(initializer_range=0.2)),
        vision_config=Qwen2_5_VLVisionConfig(**tower(window_size=16, fullatt_block_indexes=[1])),
        **IDS,
    )
    return HyperCLOVAXVisionV2ForConditionalGeneration(config)


ZOO = {
    "CohereCompassForConditionalGeneration": TinyFamily(
        cohere_compass, qwen_image, qwen3_vl_video, min_stage=2, is_qwen=True
    ),
    "Cosmos3EdgeForConditionalGeneration": TinyFamily(cosmos3_edge, patches_of(3 * 4 * 4), is_qwen=True),
    "Ernie4_5_VLMoeForConditionalGeneration": TinyFamily(ernie4_5_vl_moe, patches_of(3 * 4 * 4), is_qwen=True),
    "Exaone4_5_ForConditionalGeneration": TinyFamily(exaone4_5, qwen_image, qwen2_5_vl_video),
    "HunYuanVLForConditionalGeneration": TinyFamily(
        hunyuan_vl,
        hunyuan_vl_image,
        is_qwen=True,
        limits_itself="an axis of the positions counts the images of the whole batch: a row with two images, after "
        "a row with one, differs by 0.08 of logits to 6 from the row alone",
    ),
    "HyperCLOVAXVisionV2ForConditionalGeneration": TinyFamily(hyperclovax, qwen_image, qwen2_5_vl_video),
}
