"""Models in folders, as vLLM takes them: the embedded LLaVA, and a tiny random model of each class, with processors."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from tests.models.tiny_families import (
    BOS_ID,
    EOS_ID,
    FIRST_WORD,
    IMAGE_ID,
    LAST_WORD,
    PAD_ID,
    PINPOINTS,
    TINY,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    VOCABULARY,
    TinyFamily,
)
from tests.models.zoo.gemma import gemma3
from toprl_models import tiny

QWEN = {
    "<|image_pad|>": IMAGE_ID,
    "<|video_pad|>": VIDEO_ID,
    "<|vision_start|>": VISION_START_ID,
    "<|vision_end|>": VISION_END_ID,
}
INTERNVL = {"<IMG_CONTEXT>": IMAGE_ID, "<video>": VIDEO_ID, "<img>": VISION_START_ID, "</img>": VISION_END_ID}
GEMMA = {"<image_soft_token>": IMAGE_ID, "<start_of_image>": VISION_START_ID, "<end_of_image>": VISION_END_ID}
LLAVA = {"<image>": IMAGE_ID, "<video>": VIDEO_ID}
NEWLINES = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")  # which vLLM's Gemma 3 looks for; nothing makes them here


class Kind(NamedTuple):
    """A class of models: its tiny model, its processor, and how a prompt says image."""

    build: Callable[[], Any]
    processor: Callable[[], Any]
    image: str
    sizes: tuple[tuple[int, int], ...]  # width and height of pictures


def tokenizer(marks: dict[str, int], **names: str) -> Any:
    """A word-level tokenizer whose words are w4, w5, ... w89."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": PAD_ID, "<unk>": 1, "</s>": EOS_ID, "<s>": BOS_ID} | marks
    vocab |= {f"w{number}": number for number in range(FIRST_WORD, LAST_WORD + 1)}
    free = [number for number in range(LAST_WORD, 0, -1) if number > LAST_WORD - len(NEWLINES)]
    for text, number in zip(NEWLINES, free, strict=True):
        del vocab[f"w{number}"]
        vocab[text] = number
    for number in sorted(set(range(VOCABULARY)) - set(vocab.values())):
        vocab[f"w{number}"] = number
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        additional_special_tokens=list(marks),
        extra_special_tokens=names,
    )


def llava_processor() -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    size = {"height": 32, "width": 32}
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size),
        tokenizer(LLAVA, image_token="<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="x",
    )


def llava_next_processor() -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    size = {"height": 32, "width": 32}
    return LlavaNextProcessor(
        LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer(LLAVA, image_token="<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="x",
    )


def llava_onevision_processor() -> Any:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    size = {"height": 32, "width": 32}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer(LLAVA, image_token="<image>", video_token="<video>"),
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template="x",
    )


def qwen_processor(name: str, **sizes: Any) -> Any:
    import transformers

    token = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    token |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    cut = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, **sizes}
    video = "Qwen3VLVideoProcessor" if "3VL" in name else "Qwen2VLVideoProcessor"
    return getattr(transformers, name)(
        transformers.Qwen2VLImageProcessor(**cut),
        tokenizer(QWEN, **token),
        getattr(transformers, video)(**cut),
        chat_template="x",
    )


def internvl_processor() -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    size = {"height": 32, "width": 32}
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=2),
        tokenizer(INTERNVL, **names, video_token="<video>"),
        InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template="x",
    )


def gemma_processor() -> Any:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    return Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer(GEMMA, **names),
        image_seq_length=16,
        chat_template="x",
    )


SQUARE = ((32, 32), (40, 40))
MIXED = ((64, 32), (32, 64), (60, 20))
GRIDS = ((32, 32), (48, 16), (48, 32))
PIXELS = {"min_pixels": 8 * 8, "max_pixels": 64 * 64}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
KINDS = {
    "llava": Kind(TINY["llava"].build, llava_processor, "<image>", SQUARE),
    "llava_next": Kind(TINY["llava_next"].build, llava_next_processor, "<image>", MIXED),
    "llava_onevision": Kind(TINY["llava_onevision"].build, llava_onevision_processor, "<image>", MIXED),
    "qwen2_5_vl": Kind(
        TINY["qwen2_5_vl"].build,
        functools.partial(qwen_processor, "Qwen2_5_VLProcessor", **PIXELS),
        QWEN_IMAGE,
        GRIDS,
    ),
    "qwen3_vl": Kind(
        TINY["qwen3_vl"].build, functools.partial(qwen_processor, "Qwen3VLProcessor", **PIXELS), QWEN_IMAGE, GRIDS
    ),
    "internvl": Kind(TINY["internvl"].build, internvl_processor, "<IMG_CONTEXT>", MIXED),
    "gemma3": Kind(gemma3, gemma_processor, "<start_of_image>", SQUARE),
}


def save(kind: str, folder: Path) -> Path:
    """A random model of this kind in a folder, in float32."""
    torch.manual_seed(0)
    model = KINDS[kind].build()
    text = model.config.get_text_config()
    # vLLM's attention for the CPU has no heads of 16
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 2, 1, 32
    if "mrope_section" in (text.rope_parameters or {}):
        text.rope_parameters["mrope_section"] = [6, 5, 5]
    model = type(model)(model.config).eval()
    if kind == "gemma3":
        model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(std=0.3)  # zeros at first
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    KINDS[kind].processor().save_pretrained(folder)
    return renamed(folder, folder)


def save_tiny_llava(folder: Path) -> Path:
    """The embedded checkpoint."""
    shutil.copytree(tiny.CHECKPOINT, folder, dirs_exist_ok=True)
    return renamed(folder, folder)


def renamed(source: Path, folder: Path) -> Path:
    """Name the CLIP tower's weights as vLLM does: recent transformers leave out ``vision_model``."""
    from safetensors.torch import load_file, save_file

    stored, weights = load_file(source / "model.safetensors"), {}
    is_clip = any("vision_tower.encoder.layers." in name for name in stored)
    for name, tensor in stored.items():
        head, tower, rest = name.partition("vision_tower.")
        weights[f"{head}{tower}vision_model.{rest}" if tower and is_clip else name] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Coloured noise in blocks of 4 pixels."""
    width, height = size
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def words(seed: int, count: int) -> str:
    """Random words of the tokenizer."""
    numbers = np.random.default_rng(seed).integers(FIRST_WORD, LAST_WORD - len(NEWLINES), count)
    return " ".join(f"w{number}" for number in numbers)


__all__ = ["KINDS", "Kind", "TinyFamily", "picture", "save", "save_tiny_llava", "words"]
