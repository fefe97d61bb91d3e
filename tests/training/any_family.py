"""Tiny random models of every family with the processors of transformers, and data sets of one's own for them."""

from __future__ import annotations

import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

from tests.models.tiny_families import (
    BOS_ID,
    EOS_ID,
    IMAGE_ID,
    LAST_WORD,
    PAD_ID,
    PINPOINTS,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    VOCABULARY,
)
from tests.training.tables import write_jsonl

MARKS = {
    PAD_ID: "<pad>",
    BOS_ID: "<bos>",
    EOS_ID: "<eos>",
    1: "<unk>",
    IMAGE_ID: "<image>",
    VIDEO_ID: "<video>",
    VISION_START_ID: "<start>",
    VISION_END_ID: "<end>",
}
WORDS = [f"word{i}" for i in range(4, LAST_WORD + 1)]
# one token, one box: a random model's first word is an answer that can be scored
BOXES = [f"[0.{i // 9},0.{i % 9},0.99,0.{91 + i % 8}]" for i in range(4, LAST_WORD + 1)]
SIZES = ((40, 30), (24, 64), (64, 32), (32, 32), (70, 20))  # width and height
MARKED = ("qwen2_5_vl", "qwen3_vl")  # the template writes the marks around an image


def tokenizer(family: str, words: list[str]) -> Any:
    """Word level; every id of the tiny models is a word or a mark, so that all they say can be read."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    regular = iter(words)
    vocabulary = {MARKS.get(i) or next(regular, f"<extra{i}>"): i for i in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    start, end = ("<start>", "<end>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        additional_special_tokens=[MARKS[i] for i in (IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID)],
        extra_special_tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "context_image_token": "<image>",
            "vision_start_token": start,
            "vision_end_token": end,
            "start_image_token": start,
            "end_image_token": end,
        },
    )


def processor(family: str, words: list[str] = WORDS) -> Any:
    """The family's own processor, of the sizes of its tiny model; videos would need torchvision."""
    t = transformers
    square = {"height": 32, "width": 32}
    clip = {"size": {"shortest_edge": 32}, "crop_size": square}
    patches = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    qwen = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 256, "max_pixels": 3072}
    made = {
        "llava": lambda: (t.LlavaProcessor, t.CLIPImageProcessor(**clip), patches),
        "llava_next": lambda: (
            t.LlavaNextProcessor,
            t.LlavaNextImageProcessor(**clip, image_grid_pinpoints=PINPOINTS),
            patches,
        ),
        "video_llava": lambda: (t.VideoLlavaProcessor, t.VideoLlavaImageProcessor(**clip), patches),
        "llava_onevision": lambda: (
            t.LlavaOnevisionProcessor,
            t.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=PINPOINTS),
            {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        ),
        "qwen2_5_vl": lambda: (t.Qwen2_5_VLProcessor, t.Qwen2VLImageProcessor(**qwen), {}),
        "qwen3_vl": lambda: (t.Qwen3VLProcessor, t.Qwen2VLImageProcessor(**qwen), {}),
        "internvl": lambda: (
            t.InternVLProcessor,
            t.GotOcr2ImageProcessor(size=square, crop_to_patches=True, max_patches=3),
            {"image_seq_length": 16},
        ),
    }
    cls, images, options = made[family]()
    image = "<start><image><end>" if family in MARKED else "<image>"
    template = (
        "<bos> {% for c in messages[0]['content'] %}{% if c['type'] == 'image' %}IMAGE "
        "{% else %}{{ c['text'] }} {% endif %}{% endfor %}".replace("IMAGE", image)
    )
    with _no_videos():
        return cls(image_processor=images, tokenizer=tokenizer(family, words), chat_template=template, **options)


@contextmanager
def _no_videos():
    """The processors of video models ask for a video processor, and those need torchvision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
        yield


def write_data(folder: Path, rows: int = 8, several: bool = True) -> Path:
    """``train.jsonl`` of pictures of different sizes, one or two a row; the answers are to be filled in."""
    draw = random.Random(0)
    data = []
    for number in range(rows):
        names = []
        for part in range(1 + (several and number % 3 == 1)):
            size = SIZES[(number + part) % len(SIZES)]
            colours = bytes(draw.randrange(256) for _ in range(3 * 16))
            picture = Image.frombytes("RGB", (4, 4), colours).resize(size, Image.Resampling.BILINEAR)
            names.append(f"{number}_{part}.png")
            picture.save(folder / names[-1])
        question = " ".join(draw.choice(WORDS) for _ in range(3 + number % 4))
        data.append({"images": names, "question": question, "answer": "word4"})
    write_jsonl(folder / "train.jsonl", data)
    return folder / "train.jsonl"
