"""Classes that take images by row, padded with images of zeros; and those that look up visual words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.models.tiny_families import (
    FIRST_WORD,
    HIDDEN_SIZE,
    IMAGE_ID,
    PAD_ID,
    VISION_END_ID,
    VISION_START_ID,
    Item,
    Rows,
    TinyFamily,
    image_of,
    pixels,
    text_config,
    vision_config,
)

FRAMES = 2  # of a video, each an image


def images_of(rows: Rows) -> list[int]:
    return [sum(FRAMES if kind == "video" else 1 for kind in row) for row in rows]


def video_of_images(tokens: int) -> Callable[[int, torch.Generator], Item]:
    """Make videos of two images, each after its time stamp."""
    image = image_of(tokens)

    def video(number: int, generator: torch.Generator) -> Item:
        frames = [image(number, False, generator) for _ in range(FRAMES)]
        ids = [token for frame, item in enumerate(frames) for token in (FIRST_WORD + frame, *item.ids)]
        return Item(ids, {"pixel_values": torch.cat([item.tensors["pixel_values"] for item in frames])})

    return video


def by_row(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Bring images [images, ...] into rows [rows, most images of a row, ...]; the models leave out images of zeros."""
    if "pixel_values" not in inputs:
        return inputs
    values = inputs["pixel_values"].split(images_of(rows))
    padded = torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)
    return {**inputs, "pixel_values": padded}


def with_real_tiles(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    inputs = by_row(inputs, rows)
    if "pixel_values" not in inputs:
        return inputs
    counts = torch.tensor(images_of(rows))
    real = torch.arange(inputs["pixel_values"].shape[1]) < counts[:, None]
    return {**inputs, "pixel_attention_mask": real}


def idefics2():
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration, MistralConfig

    config = Idefics2Config(
        text_config=MistralConfig(**text_config(sliding_window=None)),
        vision_config=vision_config(initializer_range=0.3),
        perceiver_config={
            "hidden_size": HIDDEN_SIZE,
            "resampler_n_latents": 8,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
            "initializer_range": 0.3,
        },
        image_token_id=IMAGE_ID,
    )
    return Idefics2ForConditionalGeneration(config)


def idefics3():
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    config = Idefics3Config(
        text_config=LlamaConfig(**text_config()),
        vision_config=vision_config(patch_size=4),
        image_token_id=IMAGE_ID,
        scale_factor=2,
        pad_token_id=PAD_ID,
    )
    return Idefics3ForConditionalGeneration(config)


def granite_docling():
    from transformers import GraniteDoclingConfig, GraniteDoclingForConditionalGeneration

    multipliers = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}
    config = GraniteDoclingConfig(
        text_config=text_config(attention_multiplier=0.25, **multipliers),
        vision_config=vision_config(
            num_hidden_layers=3, out_hidden_size=HIDDEN_SIZE, scale_factor=2, deepstack_visual_indexes=[0, 1]
        ),
        image_token_id=IMAGE_ID,
        pad_token_id=PAD_ID,
    )
    return GraniteDoclingForConditionalGeneration(config)


# --- images as words of a code book ---


def words_of_images() -> dict[str, int]:
    """Name the placeholder and 16 visual words, which share their ids with words."""
    letters = "ABCDEFGHIJ"
    return {"<image>": IMAGE_ID} | {f"IMGIMG{letters[n // 10]}{letters[n % 10]}Z": 4 + n for n in range(16)}


def chameleon(**changes: Any):
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    config = ChameleonConfig(
        **text_config(),
        vocabulary_map=words_of_images(),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 8,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
        },
        **changes,
    )
    return ChameleonForConditionalGeneration(config)


def emu3():
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    names = {"<image>": IMAGE_ID, "<|extra_200|>": 89} | {f"<|visual token {n:06d}|>": 4 + n for n in range(16)}
    config = Emu3Config(
        text_config=text_config(attention_dropout=0.0),
        vocabulary_map=names,
        vq_config={
            "codebook_size": 16,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
            "attn_resolutions": [],
        },
    )
    return Emu3ForConditionalGeneration(config)


SIZES = ((32, 32), (16, 32), (32, 16))  # height and width


def emu3_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    """Make an image of one token for 8 x 8 pixels and one at the end of each row; smaller images are padded."""
    height, width = SIZES[number % len(SIZES)]
    values = torch.zeros(1, 3, 32, 32)
    values[..., :height, :width] = pixels(generator, 1, 3, height, width)
    tokens = (height // 8) * (width // 8 + 1)
    return Item(
        [VISION_START_ID, *[IMAGE_ID] * tokens, VISION_END_ID],
        {"pixel_values": values, "image_sizes": torch.tensor([(height, width)])},
    )


# --- patches that are tokens at once ---


def fuyu():
    from transformers import FuyuConfig, FuyuForCausalLM, PersimmonConfig

    config = FuyuConfig(
        text_config=PersimmonConfig(**text_config()), patch_size=4, image_token_id=IMAGE_ID, initializer_range=0.3
    )
    return FuyuForCausalLM(config)


def fuyu_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    tokens = (16, 12, 20)[number % 3]
    return Item([IMAGE_ID] * tokens, {"pixel_values": pixels(generator, tokens, 3 * 4 * 4)})


ZOO = {
    "ChameleonForConditionalGeneration": TinyFamily(chameleon, image_of(64)),
    "ChameleonForConditionalGeneration+swin_norm": TinyFamily(lambda: chameleon(swin_norm=True), image_of(64)),
    "Emu3ForConditionalGeneration": TinyFamily(emu3, emu3_image),
    "FuyuForCausalLM": TinyFamily(fuyu, fuyu_image),
    "GraniteDoclingForConditionalGeneration": TinyFamily(
        granite_docling, image_of(4), min_stage=2, finish=with_real_tiles
    ),
    "Idefics2ForConditionalGeneration": TinyFamily(idefics2, image_of(8), finish=by_row),
    "Idefics3ForConditionalGeneration": TinyFamily(idefics3, image_of(16), finish=by_row),
}
