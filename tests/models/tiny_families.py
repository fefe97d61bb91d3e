"""A tiny random model and prompts for every supported family: real classes of transformers, a few thousand weights.

Prompts are made by hand, as the processors would (several processors need torchvision). A row of a batch is a tuple of
"image" and "video"; successive images differ in size where the family allows it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PAD_ID, EOS_ID, BOS_ID = 0, 2, 3
IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID = 90, 91, 92, 93
FIRST_WORD, LAST_WORD, VOCABULARY = 4, 89, 97
NUM_LAYERS = 6
HIDDEN_SIZE = 64

Rows = Sequence[Sequence[str]]
# arguments with a number for each token, and what text that comes later has there
TOKEN_ARGUMENTS = {"input_ids": FIRST_WORD, "attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}


@dataclass
class Item:
    """One image or video: the ids that stand for it, and its tensors by argument name."""

    ids: list[int]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def text_config(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 128,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        # large enough that dropping tokens moves the logits well beyond rounding
        "initializer_range": 0.3,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        **changes,
    }


def clip_config() -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 32,
    }


def vision_config(**changes: Any) -> dict[str, Any]:
    """The same tower for classes with a SigLIP or the like: 16 patches of an image of 32 x 32."""
    vision = {key: value for key, value in clip_config().items() if key not in ("model_type", "projection_dim")}
    return {**vision, **changes}


def pixels(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def image_of(tokens: int, *shape: int) -> Callable[[int, bool, torch.Generator], Item]:
    """Make images of one size, ``tokens`` each between their marks; ``shape`` is that of pixel_values."""

    def image(number: int, alone: bool, generator: torch.Generator) -> Item:
        ids = [VISION_START_ID, *[IMAGE_ID] * tokens, VISION_END_ID]
        return Item(ids, {"pixel_values": pixels(generator, *(shape or (1, 3, 32, 32)))})

    return image


# --- LLaVA-1.5: 16 patches an image ---


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_without_type(clip_config())),
        text_config=LlamaConfig(**text_config()),
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def llava_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    return Item([IMAGE_ID] * 16, {"pixel_values": pixels(generator, 1, 3, 32, 32)})


# --- LLaVA-NeXT: a base tile, then unpadded tiles with a newline feature at the end of each row ---

ANYRES = (((32, 64), 16 + 4 * 9), ((64, 32), 16 + 8 * 5), ((16, 64), 16 + 2 * 9))  # height and width, tokens
PINPOINTS = [[32, 64], [64, 32]]


def llava_next():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_without_type(clip_config())),
        text_config=LlamaConfig(**text_config()),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextForConditionalGeneration(config)


def llava_next_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    size, tokens = ANYRES[number % len(ANYRES)]
    return Item(
        [IMAGE_ID] * tokens,
        {"pixel_values": pixels(generator, 1, 3, 3, 32, 32), "image_sizes": torch.tensor([size])},
    )


# --- Video-LLaVA: 16 patches an image; 17 (the class token stays) for each frame of a video ---


def video_llava():
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**_without_type(clip_config())),
        text_config=LlamaConfig(**text_config()),
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        vision_feature_layer=-1,
        image_seq_length=16,
        video_seq_length=34,
    )
    return VideoLlavaForConditionalGeneration(config)


def video_llava_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    from transformers import VideoLlavaForConditionalGeneration

    # the argument was renamed in transformers 5.23
    known = inspect.signature(VideoLlavaForConditionalGeneration.forward).parameters
    name = "pixel_values" if "pixel_values" in known else "pixel_values_images"
    return Item([IMAGE_ID] * 16, {name: pixels(generator, 1, 3, 32, 32)})


def video_llava_video(number: int, generator: torch.Generator) -> Item:
    return Item([VIDEO_ID] * 34, {"pixel_values_videos": pixels(generator, 1, 2, 3, 32, 32)})


# --- LLaVA-OneVision: anyres for a row's only image, one tile and a newline for each of several; pooled frames ---


def llava_onevision():
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision_config(), vision_use_head=False),
        text_config=Qwen2Config(**text_config()),
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def llava_onevision_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    size, tokens = ANYRES[number % len(ANYRES)]
    values = pixels(generator, 1, 3, 3, 32, 32)
    return Item(
        [IMAGE_ID] * (tokens if alone else 17),
        {"pixel_values": values, "image_sizes": torch.tensor([size])},
    )


def llava_onevision_video(number: int, generator: torch.Generator) -> Item:
    return Item([VIDEO_ID] * (3 * 4 + 1), {"pixel_values_videos": pixels(generator, 1, 3, 3, 32, 32)})


# --- Qwen2.5-VL and Qwen3-VL: any grid, 2x2 patches merged, M-RoPE ---

GRIDS = ((1, 8, 8), (1, 4, 12), (1, 8, 12))
VIDEO_GRID = (2, 8, 4)


def qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=text_config(rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]}),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": HIDDEN_SIZE,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _patches(grid: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    frames, height, width = grid
    return pixels(generator, frames * height * width, 3 * 2 * 4 * 4)


def qwen_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    grid = GRIDS[number % len(GRIDS)]
    ids = [VISION_START_ID] + [IMAGE_ID] * (grid[1] * grid[2] // 4) + [VISION_END_ID]
    return Item(ids, {"pixel_values": _patches(grid, generator), "image_grid_thw": torch.tensor([grid])})


def qwen2_5_vl_video(number: int, generator: torch.Generator) -> Item:
    frames, height, width = VIDEO_GRID
    ids = [VISION_START_ID] + [VIDEO_ID] * (frames * height * width // 4) + [VISION_END_ID]
    return Item(
        ids, {"pixel_values_videos": _patches(VIDEO_GRID, generator), "video_grid_thw": torch.tensor([VIDEO_GRID])}
    )


def qwen3_vl():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config=text_config(
            head_dim=16,
            rope_parameters={"rope_type": "default", "mrope_section": [3, 3, 2], "mrope_interleaved": True},
        ),
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": HIDDEN_SIZE,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
    )
    return Qwen3VLForConditionalGeneration(config)


def qwen3_vl_video(number: int, generator: torch.Generator) -> Item:
    """Every frame stands alone, behind its time stamp."""
    frames, height, width = VIDEO_GRID
    ids = []
    for frame in range(frames):
        ids += [FIRST_WORD + frame, VISION_START_ID] + [VIDEO_ID] * (height * width // 4) + [VISION_END_ID]
    return Item(
        ids, {"pixel_values_videos": _patches(VIDEO_GRID, generator), "video_grid_thw": torch.tensor([VIDEO_GRID])}
    )


# --- InternVL: 16 tokens a tile; a video is a sequence of images with the image's id ---


def internvl():
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

    config = InternVLConfig(
        text_config=Qwen2Config(**text_config()),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [32, 32],
            "patch_size": [4, 4],
        },
        image_token_id=IMAGE_ID,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def internvl_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    tiles = 1 + number % 2
    ids = [VISION_START_ID] + [IMAGE_ID] * (16 * tiles) + [VISION_END_ID]
    return Item(ids, {"pixel_values": pixels(generator, tiles, 3, 32, 32)})


def internvl_video(number: int, generator: torch.Generator) -> Item:
    ids = []
    for frame in range(2):
        ids += [FIRST_WORD + frame, VISION_START_ID] + [IMAGE_ID] * 16 + [VISION_END_ID]
    return Item(ids, {"pixel_values": pixels(generator, 2, 3, 32, 32)})


# --- the table, and batches ---


@dataclass(frozen=True)
class TinyFamily:
    build: Callable[[], Any]
    image: Callable[[int, bool, torch.Generator], Item]
    video: Callable[[int, torch.Generator], Item] | None = None
    min_stage: int = 0
    is_qwen: bool = False  # needs mm_token_type_ids
    counts_images: bool = False  # needs batch_num_images
    mixes: bool = True  # takes images and videos in one call
    blocks: str = ""  # whose tokens see each other: those of an "image", of the whole "prompt"
    repeats_images: bool = True  # several answers to a prompt with several images see these in order
    attn_implementation: str = "sdpa"  # what the decoder uses unless told otherwise
    finish: Callable[[dict[str, Tensor], Rows], dict[str, Tensor]] | None = None  # the last word on the inputs
    not_a_case: str = ""  # why no visual token is a token of the decoder
    cannot_build: str = ""  # why the class cannot be built
    limits_itself: str = ""  # where the class disagrees with itself, unpruned


TINY = {
    "llava": TinyFamily(llava, llava_image),
    "llava_next": TinyFamily(llava_next, llava_next_image),
    "video_llava": TinyFamily(video_llava, video_llava_image, video_llava_video),
    "llava_onevision": TinyFamily(llava_onevision, llava_onevision_image, llava_onevision_video, counts_images=True),
    "qwen2_5_vl": TinyFamily(qwen2_5_vl, qwen_image, qwen2_5_vl_video, is_qwen=True),
    "qwen3_vl": TinyFamily(qwen3_vl, qwen_image, qwen3_vl_video, is_qwen=True),
    "internvl": TinyFamily(internvl, internvl_image, internvl_video),
}
FAMILY_NAMES = list(TINY)
# further families of the matrix, by transformers' model type: classes whose tiny models are in tests.models.zoo
MORE_FAMILIES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "glm4v": "Glm4vForConditionalGeneration",
    "glm46v": "Glm46VForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "lfm2_vl": "Lfm2VlForConditionalGeneration",
    "ovis2": "Ovis2ForConditionalGeneration",
    "minicpmv4_6": "MiniCPMV4_6ForConditionalGeneration",
    "paddleocr_vl": "PaddleOCRVLForConditionalGeneration",
}


def tiny_family(family: str | TinyFamily) -> TinyFamily:
    """Look a family of the matrix up; any other one is passed as a TinyFamily."""
    if isinstance(family, TinyFamily):
        return family
    if family in TINY:
        return TINY[family]
    from tests.models.zoo import ZOO  # which takes its parts from here

    return ZOO[MORE_FAMILIES[family]]


def build_model(family: str | TinyFamily = "llava", attn_implementation: str | None = None, seed: int = 0) -> Any:
    """A float32 model in eval mode whose parameters need no gradient; the decoder uses ``attn_implementation``."""
    tiny = tiny_family(family)
    torch.manual_seed(seed)
    model = tiny.build().eval()
    implementation = attn_implementation or tiny.attn_implementation
    # the empty name stands for the model's config where that is the decoder's too
    decoder = model.config.get_text_config(decoder=True)
    place = next((name for name in model.config.sub_configs if getattr(model.config, name) is decoder), "")
    model.set_attn_implementation({place: implementation})
    model.generation_config.eos_token_id = None  # random models must not stop early
    model.generation_config.pad_token_id = PAD_ID
    if (
        family in MORE_FAMILIES
    ):  # nor answer with a placeholder, which would want an image, or with Ovis2's marks of one
        marks = getattr(model.config, "visual_indicator_token_ids", ())
        model.generation_config.suppress_tokens = [IMAGE_ID, VIDEO_ID, *marks]
    model.requires_grad_(False)
    return model


def in_float64(model: Any) -> Any:
    """The model in float64, with experts one by one: torch's grouped product of matrices has no float64."""
    model.config.get_text_config()._experts_implementation = "eager"
    return model.double()


def build_inputs(
    family: str | TinyFamily = "llava", rows: Rows = (("image",),), seed: int = 0, padding_side: str = "left"
) -> dict[str, Tensor]:
    """Arguments of forward() and generate(): one prompt per row; lengths differ, shorter prompts are padded."""
    return assemble(tiny_family(family), *parts_of(family, rows, seed), rows, padding_side)


def parts_of(family: str | TinyFamily, rows: Rows, seed: int = 0) -> tuple[list[list[int]], list[list[Item]]]:
    """Ids and items of each row; videos alone where there is one and the class takes no images along."""
    tiny = tiny_family(family)
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(FIRST_WORD, LAST_WORD + 1, (n,), generator=generator).tolist()

    has_videos = any("video" in row for row in rows)
    prompts: list[list[int]] = []
    items: list[list[Item]] = []
    for number, row in enumerate(rows):
        ids = [BOS_ID, *words(2 + number)]
        items.append([])
        for kind in row:
            count = sum(map(len, items))
            if kind == "image" and (tiny.mixes or not has_videos):
                item = tiny.image(count, list(row).count("image") == 1, generator)
            else:
                assert tiny.video is not None, f"{family} has no video"
                item = tiny.video(count, generator)
            items[-1].append(item)
            ids += [*item.ids, *words(2)]
        prompts.append(ids + words(3 + 2 * number))
    return prompts, items


def assemble(
    tiny: TinyFamily, prompts: list[list[int]], items: list[list[Item]], rows: Rows, padding_side: str = "left"
) -> dict[str, Tensor]:
    """Pad prompts to a batch and lay the tensors of their items one behind the other."""
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), PAD_ID)
    mask = torch.zeros_like(ids)
    for number, prompt in enumerate(prompts):
        place = slice(length - len(prompt), None) if padding_side == "left" else slice(None, len(prompt))
        ids[number, place] = torch.tensor(prompt)
        mask[number, place] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    tensors = [item.tensors for row in items for item in row]
    for name in dict.fromkeys(name for item in tensors for name in item):
        inputs[name] = torch.cat([item[name] for item in tensors if name in item])
    if tiny.is_qwen:
        inputs["mm_token_type_ids"] = (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int()
    if tiny.counts_images and "pixel_values" in inputs:
        inputs["batch_num_images"] = torch.tensor([n for row in rows if (n := list(row).count("image"))])
    return tiny.finish(inputs, rows) if tiny.finish else inputs


def visual_mask(inputs: dict[str, Tensor]) -> Tensor:
    """bool [B, N]: the placeholders."""
    return torch.isin(inputs["input_ids"], torch.tensor([IMAGE_ID, VIDEO_ID]))


def _without_type(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "model_type"}
