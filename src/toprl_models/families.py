"""The supported model families, one row each: where the pruner finds things. A family needs no code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from toprl_models.probe import ID_NAMES, refusal_of, videos_have_image_ids, visual_id_names

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """A row of the table: places that the pruner looks up in one class of models.

    Attributes:
        model_class: name of the transformers class (subclasses are covered by it).
        title: the family's name, for tables.
        visual_rule: one sentence: which tokens count as visual and may be dropped, which of the image's never are.
        visual_ids: config attributes that hold the placeholder ids; a token with such an id is a visual token. Empty:
            those that ``probe.visual_id_names`` finds.
        min_stage: first layer that may prune, or a function of the model that says so.
        limits: one sentence about what does not work, "" for nothing.
        depths: decoder layers of the released models, by size, for the tables of ``toprl_models.check``.
        first_stage: first layer that may prune in the released models, for the same tables.
    """

    model_class: str
    title: str
    visual_rule: str
    visual_ids: tuple[str, ...] = ()
    min_stage: int | Callable[[PreTrainedModel], int] = 0
    limits: str = ""
    depths: Mapping[str, int] = field(default_factory=dict, hash=False)
    first_stage: int = 1


FAMILIES: dict[str, Family] = {
    family.model_class: family
    for family in (
        Family(
            "LlavaForConditionalGeneration",
            "LLaVA-1.5",
            "Every placeholder is one patch of the image, 576 of 336 x 336 pixels; nothing lies between the patches.",
            depths={"7B": 32, "13B": 40},
        ),
        Family(
            "LlavaNextForConditionalGeneration",
            "LLaVA-NeXT",
            "Patches of the overview and of all tiles, and the newline feature behind each row of tiles: it sits in "
            "an image slot and may be dropped like a patch.",
            depths={"7B": 32, "13B": 40, "34B": 60},
        ),
        Family(
            "VideoLlavaForConditionalGeneration",
            "Video-LLaVA",
            "Patches of images, and of every frame of a video with the class token of each frame.",
            depths={"7B": 32},
        ),
        Family(
            "LlavaOnevisionForConditionalGeneration",
            "LLaVA-OneVision",
            "Patches of overview and tiles (a single tile where a prompt has several images), pooled patches of video "
            "frames, and the newline features, which sit in visual slots and may be dropped like patches.",
            depths={"0.5B": 24, "7B": 28, "72B": 80},
        ),
        Family(
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2.5-VL",
            "Merged 2 x 2 patches of images and video frames, in raster order: the vision tower undoes its windows. "
            "<|vision_start|> and <|vision_end|> are text and always stay.",
            depths={"3B": 36, "7B": 28, "32B": 64, "72B": 80},
        ),
        Family(
            "InternVLForConditionalGeneration",
            "InternVL3",
            "All 256 tokens of every tile, thumbnail included; frames of a video are images. The marks around them are "
            "text and always stay.",
            depths={"1B": 24, "2B": 28, "8B": 28, "14B": 48, "38B": 64, "78B": 80},
        ),
        Family(
            "Qwen3VLForConditionalGeneration",
            "Qwen3-VL",
            "Merged 2 x 2 patches of images and video frames. <|vision_start|>, <|vision_end|> and the time stamps "
            "between frames are text and always stay.",
            depths={"2B": 28, "4B": 36, "8B": 36, "32B": 64},
        ),
        Family(
            "Qwen2VLForConditionalGeneration",
            "Qwen2-VL",
            "Merged 2 x 2 patches of images and video frames, in raster order. <|vision_start|> and <|vision_end|> "
            "are text and always stay.",
            depths={"2B": 28, "7B": 28, "72B": 80},
        ),
        Family(
            "Qwen3VLMoeForConditionalGeneration",
            "Qwen3-VL-MoE",
            "Merged 2 x 2 patches of images and video frames. <|vision_start|>, <|vision_end|> and the time stamps "
            "between frames are text and always stay.",
            depths={"30B": 48, "235B": 94},
        ),
        Family(
            "Qwen3_5ForConditionalGeneration",
            "Qwen3.5",
            "Merged 2 x 2 patches of images and video frames, in layers of linear attention too, whose state then has "
            "not seen what was dropped. <|vision_start|>, <|vision_end|> and time stamps are text and always stay.",
        ),
        Family(
            "Qwen3_5MoeForConditionalGeneration",
            "Qwen3.5-MoE",
            "As in Qwen3.5.",
        ),
        Family(
            "Gemma3ForConditionalGeneration",
            "Gemma 3",
            "All 256 pooled tokens of an image and of each crop, which see each other; marks and line breaks around "
            "them are text and always stay.",
            depths={"4B": 34, "12B": 48, "27B": 62},
        ),
        Family(
            "Gemma4ForConditionalGeneration",
            "Gemma 4",
            "Pooled patches of images of any shape; the marks around them are text and always stay.",
        ),
        Family(
            "PaliGemmaForConditionalGeneration",
            "PaliGemma",
            "Every placeholder is one patch of the image, before the prompt; all tokens of the prompt see each other.",
            depths={"3B": 18},
        ),
        Family(
            "Mistral3ForConditionalGeneration",
            "Mistral 3",
            "Merged 2 x 2 patches of an image of any shape; the marks at the end of each row and of the image are text "
            "and always stay.",
            depths={"Small 3.1": 40},
        ),
        Family(
            "Llama4ForConditionalGeneration",
            "Llama 4",
            "Patches of all tiles, pixel-shuffled to 144 a tile, and of the overview; the marks between tiles are text "
            "and always stay.",
            depths={"Scout": 48, "Maverick": 48},
        ),
        Family(
            "Glm4vForConditionalGeneration",
            "GLM-4V",
            "Merged 2 x 2 patches of images and video frames; the marks around them and time stamps are text and "
            "always stay.",
            limits="A batch has images or videos, not both, and several answers to a prompt with several images see "
            "these in another order: so does transformers' model without a pruner.",
            depths={"9B": 40},
        ),
        Family(
            "Glm46VForConditionalGeneration",
            "GLM-4.6V",
            "As in GLM-4V.",
            limits="A batch has images or videos, not both, and several answers to a prompt with several images see "
            "these in another order: so does transformers' model without a pruner.",
        ),
        Family(
            "Idefics3ForConditionalGeneration",
            "Idefics3",
            "Pixel-shuffled patches of all tiles and of the overview; the marks of rows and columns between tiles are "
            "text and always stay.",
            depths={"8B": 32},
        ),
        Family(
            "SmolVLMForConditionalGeneration",
            "SmolVLM",
            "As in Idefics3; frames of a video are images.",
            depths={"256M": 30, "500M": 32, "2.2B": 24},
        ),
        Family(
            "Lfm2VlForConditionalGeneration",
            "LFM2-VL",
            "Pixel-unshuffled patches of an image of any shape, or of its tiles and thumbnail, in convolutions too, "
            "whose state then has not seen what was dropped; the marks around them are text and always stay.",
            depths={"450M": 16, "1.6B": 16, "3B": 30},
        ),
        Family(
            "Ovis2ForConditionalGeneration",
            "Ovis2",
            "Mixtures of visual words, one for each merged 2 x 2 patches of a tile; the indicators around them are "
            "text and always stay.",
            depths={"1B": 24, "2B": 28, "4B": 36, "8B": 28, "16B": 48, "34B": 64},
        ),
        Family(
            "MiniCPMV4_6ForConditionalGeneration",
            "MiniCPM-V 4.6",
            "Merged 4 x 4 patches of the overview and of all slices, in layers of linear attention too, whose state "
            "then has not seen what was dropped; the marks around them are text and always stay.",
        ),
        Family(
            "PaddleOCRVLForConditionalGeneration",
            "PaddleOCR-VL",
            "Merged 2 x 2 patches of an image of any shape; the marks around them are text and always stay.",
            depths={"0.9B": 18},
        ),
    )
}


def register_family(family: Family) -> None:
    """Say of a class of models what its structure does not tell: a title, sizes, the first layer that may prune.

    A class needs no row to be pruned: decoder, placeholder ids and kinds of layers are found by looking
    (``toprl_models.probe``). ``python -m toprl_models.check MODEL`` compares the pruned model with the unattached one.

    Args:
        family: the row; it replaces an earlier one of the same ``model_class``.

    Raises:
        TypeError: ``family`` is not a Family.

    Example:
        >>> from toprl_models import Family, register_family
        >>> register_family(Family("MyModelForConditionalGeneration", "My model", "All patches.", min_stage=2))
    """
    if not isinstance(family, Family):
        raise TypeError(f"family is a {type(family).__name__}; pass a toprl_models.Family")
    FAMILIES[family.model_class] = family


def family_of(model: PreTrainedModel) -> Family:
    """Return the family row of ``model``'s class or of a base class; else one made by looking at the model.

    Raises:
        TypeError: no visual token of the model is a token of its decoder; the message says why.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    name = type(model).__name__
    if name.startswith("Peft"):
        raise TypeError(f"model is a {name}, which is not supported: pass model.get_base_model()")
    if not hasattr(model, "config"):
        raise TypeError(f"model is a {name}, not a model of transformers")
    if reason := refusal_of(model):
        raise TypeError(f"model is a {name}, which is not supported: it {reason}")
    return Family(name, name.removesuffix("ForConditionalGeneration"), "Every placeholder of an image or a video.")


def min_stage_of(model: PreTrainedModel, family: Family) -> int:
    """Return the first layer of ``model`` that may prune."""
    return family.min_stage(model) if callable(family.min_stage) else family.min_stage


def visual_token_ids(model: PreTrainedModel, family: Family) -> dict[str, int]:
    """Return the ids that stand for visual tokens in ``input_ids``, by config attribute.

    Raises:
        ValueError: the model's config has none of the family's attributes.
    """
    names = family.visual_ids or visual_id_names(model.config)
    ids = {name: getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None}
    if not ids:
        raise ValueError(
            f"model: config of {type(model).__name__} has none of {', '.join(family.visual_ids or ID_NAMES)}; name the "
            "attribute that holds the placeholder id in register_family(Family(visual_ids=...))"
        )
    return ids


def count_visual(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[int]:
    """Count the visual tokens of each prompt: the placeholders of the model's family that are no padding.

    Args:
        inputs: what the processor returned, with ``input_ids`` and, where there is padding, ``attention_mask``.

    Raises:
        ValueError: no ``input_ids``.
    """
    if "input_ids" not in inputs:
        raise ValueError(f"inputs: has {', '.join(inputs) or 'nothing'}, but no input_ids to count visual tokens in")
    ids = torch.tensor([*visual_token_ids(model, family_of(model)).values()], device=inputs["input_ids"].device)
    visual = torch.isin(inputs["input_ids"], ids)
    if inputs.get("attention_mask") is not None:
        visual &= inputs["attention_mask"].bool()
    return visual.sum(1).tolist()


def placeholder_ids(model: PreTrainedModel, family: Family) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ``visual_token_ids`` of images, and those of videos if the model takes these as separate arguments.

    They are the same ids where the frames of a video stand for images in the prompt (GLM-4V). A model that takes no
    videos may have an id for them, which stands for nothing (PaddleOCR-VL).
    """
    ids = visual_token_ids(model, family)
    images = tuple(dict.fromkeys(number for name, number in ids.items() if "video" not in name))
    if "pixel_values_videos" not in inspect.signature(model.base_model.forward).parameters:
        return images or tuple(ids.values()), ()
    videos = tuple(number for number in dict.fromkeys(ids.values()) if number not in images)
    return images, images if videos_have_image_ids(model.base_model, images) else videos
