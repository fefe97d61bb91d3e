"""Decoders of other structure: latent attention, layers with a state, relative positions, learned selection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    qwen3_vl_video,
    qwen_image,
    text_config,
)

IDS = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID}
AUDIO_ID = 94
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


def grid_image(*shape: int, merged: int = 4):
    """Make images of other grids in turn; a patch has this shape and ``merged`` patches make a token."""

    def image(number: int, alone: bool, generator: torch.Generator) -> Item:
        grid = GRIDS[number % len(GRIDS)]
        patches = grid[1] * grid[2]
        ids = [VISION_START_ID, *[IMAGE_ID] * (patches // merged), VISION_END_ID]
        return Item(ids, {"pixel_values": pixels(generator, patches, *shape), "image_grid_thw": torch.tensor([grid])})

    return image


def deepseek_ocr2():
    from transformers import DeepseekOcr2Config, DeepseekOcr2ForConditionalGeneration

    sam = {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 2,
        "window_size": 4,
        "global_attn_indexes": [1],
        "downsample_channels": [16, 32],
        "initializer_range": 0.3,
    }
    encoder = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    # smaller weights than elsewhere: the long prompts' rounding errors grow less
    text = text_config(
        mlp_layer_types=["dense"] + ["sparse"] * 5, n_shared_experts=1, **EXPERTS | {"initializer_range": 0.2}
    )
    config = DeepseekOcr2Config(
        text_config=text, vision_config={"sam_config": sam, "encoder_config": encoder}, image_token_id=IMAGE_ID
    )
    return DeepseekOcr2ForConditionalGeneration(config)


def deepseek_ocr2_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    """Make a whole image, 144 tokens and a separator; every other image has a tile of 144 tokens before."""
    tiles = number % 2
    values = {
        "pixel_values": pixels(generator, 1, 3, 16, 16),
        "pixel_values_local": pixels(generator, tiles, 3, 16, 16),
        "num_local_patches": torch.tensor([tiles]),
    }
    return Item([IMAGE_ID] * (144 * tiles + 145), values)


def without_empty_tiles(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Leave the tiles out where no image has any, as the processor does."""
    if "num_local_patches" in inputs and not inputs["num_local_patches"].any():
        return {name: value for name, value in inputs.items() if "local" not in name}
    return inputs


def cosmos3_omni():
    from transformers import Cosmos3OmniConfig, Cosmos3OmniForConditionalGeneration
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig

    rope = {"rope_type": "default", "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    config = Cosmos3OmniConfig(
        text_config=Qwen3VLTextConfig(**text_config(head_dim=16, rope_parameters=rope)),
        vision_config=Qwen3VLVisionConfig(
            depth=3,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            patch_size=4,
            out_hidden_size=HIDDEN_SIZE,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
        **IDS,
    )
    return Cosmos3OmniForConditionalGeneration(config)


def dots3_note():
    """Build with layers that select tokens by an index and layers with a window; both see the whole prompt."""
    from transformers import Dots3NoteConfig, Dots3NoteForConditionalGeneration

    text = text_config(
        num_key_value_heads=4,
        head_dim=24,
        index_topk=512,
        index_head_dim=16,
        index_n_heads=2,
        sliding_window=512,
        shared_experts_intermediate_size=16,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_q_lora_rank=32,
        swa_kv_lora_rank=16,
        swa_head_dim=24,
        swa_qk_nope_head_dim=16,
        swa_v_head_dim=16,
        **LATENT,
        **EXPERTS,
    )
    config = Dots3NoteConfig(
        text_config=text,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "mlp_layer_types": ["dense", "sparse"],
            "num_local_experts": 2,
            "moe_intermediate_size": 16,
            "adapter_in_dim": 32,
            "adapter_out_dim": HIDDEN_SIZE,
            "initializer_range": 0.3,
        },
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "feature_size": 16,
            "downsample_hidden_size": 4,
            "adapter_input_size": 16,
            "adapter_out_dim": HIDDEN_SIZE,
        },
        audio_token_id=AUDIO_ID,
        **IDS,
    )
    return Dots3NoteForConditionalGeneration(config)


def inkling():
    from transformers import InklingConfig, InklingForConditionalGeneration

    config = InklingConfig(
        text_config=text_config(
            head_dim=16,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=16,
            sliding_window_size=500,
            rel_extent=512,
            layer_types=["hybrid_sliding", "hybrid_sliding", "hybrid"] * 2,
            mlp_layer_types=["dense"] + ["sparse"] * 5,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            route_scale=1.0,
            logits_mup_width_multiplier=1.0,
        ),
        vision_config={"patch_size": 4, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2},
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
        image_token_id=IMAGE_ID,
        audio_token_id=AUDIO_ID,
        image_bos_token_id=VISION_START_ID,
        audio_bos_token_id=95,
    )
    return InklingForConditionalGeneration(config)


def inkling_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    tokens = (16, 12, 20)[number % 3]
    return Item([VISION_START_ID, *[IMAGE_ID] * tokens], {"pixel_values": pixels(generator, tokens, 2, 4, 4, 3)})


def inkling2():
    from transformers import Inkling2Config, Inkling2ForConditionalGeneration

    config = Inkling2Config(
        text_config=text_config(
            unpadded_vocab_size=97,
            head_dim=16,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=16,
            sliding_window_size=500,
            rel_extent=512,
            layer_types=["hybrid_sliding", "hybrid_sliding", "hybrid"] * 2,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            route_scale=1.0,
            n_layers_per_attn_res_block=3,
        ),
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "posemb_grid_size": 8,
            "projection_hidden_dim": 32,
            "text_hidden_size": HIDDEN_SIZE,
        },
        image_token_id=IMAGE_ID,
    )
    return Inkling2ForConditionalGeneration(config)


def inkling2_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    grid = ((1, 4, 4), (1, 2, 6), (1, 4, 6))[number % 3]
    tokens = grid[1] * grid[2]
    values = {"pixel_values": pixels(generator, tokens, 8, 8, 3), "image_grid_thw": torch.tensor([grid])}
    return Item([VISION_START_ID, *[IMAGE_ID] * tokens], values)


def glm5_next(**changes: Any):
    """Build with layers with a state, and layers that select tokens by an index; these see the whole prompt."""
    from transformers import Glm5NextConfig, Glm5NextForConditionalGeneration

    text = text_config(
        num_key_value_heads=4,
        layer_types=["linear_attention", "linear_attention", "indexed_attention"] * 2,
        mlp_layer_types=["dense"] + ["sparse"] * 5,
        index_topk=512,
        index_head_dim=16,
        index_n_heads=2,
        index_kpool=2,
        linear_head_dim=16,
        linear_num_heads=4,
        hc_mult=2,
        **{**LATENT, "qk_rope_head_dim": 0},
        **EXPERTS,
    )
    config = Glm5NextConfig(
        text_config={**text, **changes},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "out_hidden_size": HIDDEN_SIZE,
            "projection_intermediate_size": 64,
        },
        image_start_token_id=VISION_START_ID,
        image_end_token_id=VISION_END_ID,
        video_start_token_id=94,
        video_end_token_id=95,
        **IDS,
    )
    return Glm5NextForConditionalGeneration(config)


ZOO = {
    "Cosmos3OmniForConditionalGeneration": TinyFamily(
        cosmos3_omni, qwen_image, qwen3_vl_video, min_stage=2, is_qwen=True
    ),
    "DeepseekOcr2ForConditionalGeneration": TinyFamily(deepseek_ocr2, deepseek_ocr2_image, finish=without_empty_tiles),
    "Dots3NoteForConditionalGeneration": TinyFamily(dots3_note, grid_image(3, 4, 4)),
    "Glm5NextForConditionalGeneration": TinyFamily(glm5_next, qwen_image, is_qwen=True),
    "InklingForConditionalGeneration": TinyFamily(inkling, inkling_image),
    "Inkling2ForConditionalGeneration": TinyFamily(inkling2, inkling2_image, attn_implementation="eager"),
}
