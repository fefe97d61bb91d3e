"""Classes whose decoder has no visual tokens among those of the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.tiny_families import (
    BOS_ID,
    EOS_ID,
    FIRST_WORD,
    HIDDEN_SIZE,
    IMAGE_ID,
    NUM_LAYERS,
    PAD_ID,
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
from tests.models.zoo.gemma import gemma4_image, gemma4_tower, gemma_text


def no_tokens(number: int, alone: bool, generator: torch.Generator) -> Item:
    return Item([])


def image_of_row(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Give every row one image."""
    return {**inputs, "pixel_values": pixels(torch.Generator().manual_seed(1), len(rows), 3, 32, 32)}


def blip():
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 128,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "projection_dim": 32,
        "initializer_range": 0.3,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "sep_token_id": EOS_ID,
    }
    config = BlipConfig(text_config=text, vision_config=vision_config(initializer_range=0.3))
    return BlipForConditionalGeneration(config)


def git():
    from transformers import GitConfig, GitForCausalLM

    config = GitConfig(
        **text_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        vision_config=vision_config(initializer_range=0.3),
    )
    return GitForCausalLM(config)


def idefics():
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    config = IdeficsConfig(
        **text_config(),
        vision_config={
            "embed_dim": 32,
            "image_size": 32,
            "intermediate_size": 64,
            "patch_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        cross_layer_interval=2,
        alpha_initializer="ones",
    )
    return IdeficsForVisionText2Text(config)


def seen_by_all(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    inputs = image_of_row(inputs, rows)
    ones = torch.ones(*inputs["input_ids"].shape, 1, dtype=torch.long)
    return {**inputs, "pixel_values": inputs["pixel_values"][:, None], "image_attention_mask": ones}


def florence2():
    from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration

    text = BartConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN_SIZE,
        encoder_layers=2,
        decoder_layers=NUM_LAYERS,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=256,
        dropout=0.0,
        init_std=0.3,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        decoder_start_token_id=EOS_ID,
        forced_eos_token_id=None,
    )
    tower = {
        "depths": (1, 1),
        "patch_size": (7, 3),
        "patch_stride": (4, 2),
        "patch_padding": (3, 1),
        "patch_prenorm": (False, True),
        "embed_dim": (16, 32),
        "num_heads": (2, 2),
        "num_groups": (2, 2),
        "window_size": 4,
        "projection_dim": HIDDEN_SIZE,
        "initializer_range": 0.3,
    }
    config = Florence2Config(text_config=text, vision_config=tower, image_token_id=IMAGE_ID)
    return Florence2ForConditionalGeneration(config)


def evolla():
    from transformers import EvollaConfig, EvollaForProteinText2Text

    protein = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.3,
    }
    config = EvollaConfig(
        **text_config(),
        protein_encoder_config=protein,
        aligner_num_add_layers=2,
        aligner_attention_probs_dropout_prob=0.0,
        resampler_depth=1,
        resampler_dim_head=8,
        resampler_heads=2,
        resampler_num_latents=4,
    )
    return EvollaForProteinText2Text(config)


def protein_of_row(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    proteins = torch.arange(FIRST_WORD, FIRST_WORD + 8 * len(rows)).view(len(rows), 8)
    return {**inputs, "protein_input_ids": proteins, "protein_attention_mask": torch.ones_like(proteins)}


def diffusion_gemma():
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig

    text = gemma_text(head_dim=8, global_head_dim=16, num_experts=4, top_k_experts=2, moe_intermediate_size=16)
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**text),
        vision_config=gemma4_tower(),
        boi_token_id=VISION_START_ID,
        eoi_token_id=VISION_END_ID,
        image_token_id=IMAGE_ID,
        canvas_length=8,
    )
    return DiffusionGemmaForBlockDiffusion(config)


def with_canvas(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    canvas = torch.arange(FIRST_WORD, FIRST_WORD + 8).repeat(len(rows), 1)
    return {**inputs, "decoder_input_ids": canvas}


def _not_a_case(why: str, build: Any, finish: Any, image: Any = no_tokens, **options: Any) -> TinyFamily:
    return TinyFamily(build, image, finish=finish, not_a_case=why, **options)


CROSS_ATTENTION = "the decoder sees the image by cross-attention alone"

ZOO = {
    "BlipForConditionalGeneration": _not_a_case(CROSS_ATTENTION, blip, image_of_row),
    "DiffusionGemmaForBlockDiffusion": _not_a_case(
        "images are read by an encoder; the decoder denoises a canvas of text that sees the encoder's keys and values",
        diffusion_gemma,
        with_canvas,
        gemma4_image,
        is_qwen=True,
    ),
    "EvollaForProteinText2Text": _not_a_case(
        "it sees proteins, not images, and these by cross-attention alone", evolla, protein_of_row
    ),
    "Florence2ForConditionalGeneration": _not_a_case(
        "encoder-decoder: image tokens are tokens of the encoder", florence2, None, image_of(17)
    ),
    "GitForCausalLM": _not_a_case(
        "no token stands for the image: its features are put before the embeddings of the prompt",
        git,
        image_of_row,
        attn_implementation="eager",
    ),
    "IdeficsForVisionText2Text": _not_a_case(CROSS_ATTENTION, idefics, seen_by_all),
}
