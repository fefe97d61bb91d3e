"""Tiny models whose images are one or more tiles of one size, each with the same number of tokens."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.models.tiny_families import (
    HIDDEN_SIZE,
    IMAGE_ID,
    PAD_ID,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    VOCABULARY,
    Item,
    Rows,
    TinyFamily,
    image_of,
    pixels,
    text_config,
    vision_config,
)
from tests.models.zoo.idefics import by_row, video_of_images
from tests.models.zoo.llava_kin import tiles


def llama4(**changes: Any) -> Any:
    """Layer 3 has no rotary; every second layer has experts."""
    text = text_config(
        head_dim=16, intermediate_size_mlp=128, num_local_experts=4, interleave_moe_layer_step=2, **changes
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


def perception_lm() -> Any:
    """A CLIP tower stands for timm's, which the class takes as any other."""
    vision = transformers.CLIPVisionConfig(**vision_config(), projection_dim=32)
    vision.model_args = {"embed_dim": 32}
    config = transformers.PerceptionLMConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**text_config()),
        projector_pooling_ratio=2,
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        tie_word_embeddings=False,
    )
    return transformers.PerceptionLMForConditionalGeneration(config)


def perception_lm_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    """One or two tiles, pooled to 4 tokens each."""
    count = 1 + number % 2
    return Item([IMAGE_ID] * (4 * count), {"pixel_values": pixels(generator, count, 1, 3, 32, 32)})


def qianfan_ocr() -> Any:
    config = transformers.QianfanOCRConfig(
        text_config=transformers.Qwen3Config(**text_config(head_dim=16)),
        vision_config=vision_config(patch_size=4, initializer_range=0.3, drop_path_rate=0.0),
        image_token_id=IMAGE_ID,
        image_seq_length=16,
    )
    return transformers.QianfanOCRForConditionalGeneration(config)


def ovis2() -> Any:
    """Patches become mixtures of a visual vocabulary; ids 93 to 96 and 92 mark where images begin and end."""
    vision = vision_config(patch_size=4, vocab_size=40, hidden_stride=2, initializer_range=0.3)
    config = transformers.Ovis2Config(
        text_config=transformers.Qwen2Config(**text_config()),
        vision_config=vision,
        image_token_id=IMAGE_ID,
        visual_indicator_token_ids=[VISION_START_ID, VISION_END_ID, 94, 95, 96],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN_SIZE,
        tie_word_embeddings=False,
    )
    return transformers.Ovis2ForConditionalGeneration(config)


def step3p7() -> Any:
    """Layer 0 is dense, the others have experts; layers with a window have more heads than those without."""
    text = text_config(
        head_dim=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        mlp_layer_types=["dense"] + ["sparse"] * 5,
        sliding_window=500,
        num_sliding_attention_heads=8,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        share_expert_dim=32,
    )
    vision = vision_config(patch_size=2, mlp_ratio=2.0, max_position_embeddings=256)
    config = transformers.Step3p7Config(text_config=text, vision_config=vision, image_token_id=IMAGE_ID)
    return transformers.Step3p7ForConditionalGeneration(config)


def step3p7_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    """A coarse tile and one or two fine ones, 16 tokens each."""
    local = 1 + number % 2
    ids = [VISION_START_ID, *[IMAGE_ID] * (16 * (1 + local)), VISION_END_ID]
    return Item(
        ids,
        {
            "pixel_values": pixels(generator, 1, 3, 32, 32),
            "pixel_values_local": pixels(generator, local, 3, 32, 32),
            "num_local_patches": torch.tensor([local]),
        },
    )


def unlimited_ocr(sliding_window: int = 500) -> Any:
    """Layer 0 is dense, the others have experts; the window holds for generated tokens alone, the prompt stays."""
    text = text_config(
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        sliding_window=sliding_window,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    sam = vision_config(patch_size=4, image_size=64, num_hidden_layers=1, output_channels=16, mlp_dim=64)
    del sam["intermediate_size"]
    config = transformers.UnlimitedOcrConfig(
        text_config=text,
        vision_config={
            "sam_config": {
                **sam,
                "window_size": 4,
                "global_attn_indexes": [0],
                "downsample_channels": [16, 32],
                "initializer_range": 0.3,
            },
            "encoder_config": vision_config(initializer_range=0.3),
        },
        image_token_id=IMAGE_ID,
    )
    return transformers.UnlimitedOcrForConditionalGeneration(config)


def smolvlm() -> Any:
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**text_config()),
        vision_config=vision_config(patch_size=4),
        image_token_id=IMAGE_ID,
        scale_factor=2,
        pad_token_id=PAD_ID,
        tie_word_embeddings=False,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def paligemma(text: Any = None) -> Any:
    text = text or transformers.GemmaConfig(**text_config(head_dim=16))
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**vision_config(), vision_use_head=False),
        image_token_index=IMAGE_ID,
        projection_dim=HIDDEN_SIZE,
        hidden_size=HIDDEN_SIZE,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def paligemma_2() -> Any:
    """Soft caps, and a window in every other layer."""
    text = text_config(head_dim=16, query_pre_attn_scalar=16, sliding_window=500, attn_logit_softcapping=2.0)
    return paligemma(transformers.Gemma2Config(**text))


def paligemma_finish(inputs: dict[str, torch.Tensor], rows: Rows) -> dict[str, torch.Tensor]:
    """Count the whole prompt to the prefix, whose tokens see each other."""
    return inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


ZOO = {
    "Llama4ForConditionalGeneration": TinyFamily(llama4, tiles(16)),
    "Llama4ForConditionalGeneration+chunks": TinyFamily(lambda: llama4(attention_chunk_size=16), tiles(16)),
    "Molmo2ForConditionalGeneration": TinyFamily(molmo2, molmo2_image, is_qwen=True, finish=molmo2_finish),
    "PerceptionLMForConditionalGeneration": TinyFamily(perception_lm, perception_lm_image),
    "QianfanOCRForConditionalGeneration": TinyFamily(qianfan_ocr, tiles(16)),
    "Ovis2ForConditionalGeneration": TinyFamily(ovis2, tiles(16)),
    "Step3p7ForConditionalGeneration": TinyFamily(step3p7, step3p7_image),
    "UnlimitedOcrForConditionalGeneration": TinyFamily(unlimited_ocr, image_of(21, 1, 3, 64, 64)),
    "UnlimitedOcrForConditionalGeneration+window": TinyFamily(lambda: unlimited_ocr(2), image_of(21, 1, 3, 64, 64)),
    "SmolVLMForConditionalGeneration": TinyFamily(smolvlm, image_of(16), video_of_images(16), finish=by_row),
    "PaliGemmaForConditionalGeneration+gemma2": TinyFamily(
        paligemma_2, tiles(16), finish=paligemma_finish, attn_implementation="eager"
    ),
    "PaliGemmaForConditionalGeneration": TinyFamily(paligemma, tiles(16), finish=paligemma_finish, blocks="prompt"),
}
