"""Classes whose tower is asked by a fixed number of queries, and which generate by their decoder's own generate()."""

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
    VIDEO_ID,
    VOCABULARY,
    Item,
    Rows,
    TinyFamily,
    image_of,
    pixels,
    vision_config,
)

QUERIES = 8
QFORMER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
}


def opt() -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN_SIZE,
        word_embed_proj_dim=HIDDEN_SIZE,
        ffn_dim=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=512,
        init_std=0.3,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def _blip(config_class: Any, model_class: Any, **ids: int) -> Any:
    config = config_class(
        text_config=opt(),
        vision_config=vision_config(initializer_range=0.3),
        qformer_config=dict(QFORMER),
        num_query_tokens=QUERIES,
        **ids,
    )
    model = model_class(config)
    model.query_tokens.data.normal_()  # alike at first, all answers with them
    model.language_model.generation_config.eos_token_id = None
    return model


def blip2():
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    return _blip(Blip2Config, Blip2ForConditionalGeneration, image_token_index=IMAGE_ID)


def instructblip():
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

    return _blip(InstructBlipConfig, InstructBlipForConditionalGeneration, image_token_index=IMAGE_ID)


def instructblipvideo():
    from transformers import InstructBlipVideoConfig, InstructBlipVideoForConditionalGeneration

    return _blip(InstructBlipVideoConfig, InstructBlipVideoForConditionalGeneration, video_token_index=VIDEO_ID)


def questions(image: Any) -> Any:
    """Give every image of ``image`` a question for the queries."""

    def asked(number: int, alone: bool, generator: torch.Generator) -> Item:
        item = image(number, alone, generator)
        words = torch.arange(FIRST_WORD, FIRST_WORD + 3)[None] + number
        return Item(item.ids, {**item.tensors, "qformer_input_ids": words})

    return asked


def four_frames(number: int, alone: bool, generator: torch.Generator) -> Item:
    return Item([VIDEO_ID] * (4 * QUERIES), {"pixel_values": pixels(generator, 1, 4, 3, 32, 32)})


def frames_of_image(number: int, generator: torch.Generator) -> Item:
    return questions(four_frames)(number, True, generator)


def never_without(**spare: tuple[int, ...]):
    """Give prompts without images a spare one that no token stands for: forward() cannot go without."""

    def finish(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
        missing = {name: shape for name, shape in spare.items() if name not in inputs}
        kinds = {name: torch.long if name.endswith("ids") else torch.float for name in missing}
        return {**inputs, **{name: torch.zeros(shape, dtype=kinds[name]) for name, shape in missing.items()}}

    return finish


def kosmos2():
    from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

    config = Kosmos2Config(
        text_config={
            "vocab_size": VOCABULARY,
            "embed_dim": HIDDEN_SIZE,
            "ffn_dim": 128,
            "layers": NUM_LAYERS,
            "attention_heads": 4,
            "max_position_embeddings": 512,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "init_std": 0.3,
            "pad_token_id": PAD_ID,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
        },
        vision_config=vision_config(),
        latent_query_num=QUERIES,
    )
    model = Kosmos2ForConditionalGeneration(config)
    model.image_to_text_projection.dense.weight.data.mul_(8)  # its inputs are of length one
    model.text_model.generation_config.eos_token_id = None
    return model


def with_places(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    if "pixel_values" not in inputs:  # forward() cannot go without: no features for no place
        inputs = {**inputs, "image_embeds": torch.zeros(0, QUERIES, HIDDEN_SIZE)}
    return {**inputs, "image_embeds_position_mask": (inputs["input_ids"] == IMAGE_ID).long()}


ZOO = {
    "Blip2ForConditionalGeneration": TinyFamily(
        blip2, image_of(QUERIES), finish=never_without(pixel_values=(1, 3, 32, 32))
    ),
    "InstructBlipForConditionalGeneration": TinyFamily(
        instructblip,
        questions(image_of(QUERIES)),
        finish=never_without(pixel_values=(1, 3, 32, 32), qformer_input_ids=(1, 3)),
    ),
    "InstructBlipVideoForConditionalGeneration": TinyFamily(
        instructblipvideo,
        questions(four_frames),
        frames_of_image,
        finish=never_without(pixel_values=(1, 4, 3, 32, 32), qformer_input_ids=(1, 3)),
    ),
    "Kosmos2ForConditionalGeneration": TinyFamily(kosmos2, image_of(QUERIES), finish=with_places),
}
