"""The supported model families, one row each: where the pruner finds things. A family needs no code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """A row of the table: places that the pruner looks up in one class of models.

    Attributes:
        model_class: name of the transformers class (subclasses are covered by it).
        title: the family's name, for tables.
        visual_rule: one sentence: which tokens count as visual and may be dropped, which of the image's never are.
        visual_ids: config attributes that hold the placeholder ids; a token with such an id is a visual token.
        min_stage: first layer that may prune, or a function of the model that says so.
        limits: one sentence about what does not work, "" for nothing.
        depths: decoder layers of the released models, by size, for the tables of ``toprl_models.check``.
        first_stage: first layer that may prune in the released models, for the same tables.
    """

    model_class: str
    title: str
    visual_rule: str
    visual_ids: tuple[str, ...] = ("image_token_id", "video_token_id")
    min_stage: int | Callable[[PreTrainedModel], int] = 0
    limits: str = ""
    depths: Mapping[str, int] = field(default_factory=dict, hash=False)
    first_stage: int = 1


def _after_deepstack(model: PreTrainedModel) -> int:
    """Count the first layers after which features of the vision tower are added to all visual slots."""
    return len(model.config.vision_config.deepstack_visual_indexes)


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
            min_stage=_after_deepstack,
            limits="Stages start behind the layers to which deepstack features are added (3 in the released models).",
            depths={"2B": 28, "4B": 36, "8B": 36, "32B": 64},
            first_stage=3,
        ),
    )
}


def register_family(family: Family) -> None:
    """Support another class of models, if it is built like the others.

    The class must have a ``base_model`` that takes ``input_ids`` and ``pixel_values*``, and a ``get_decoder()`` whose
    ``layers`` are called with ``attention_mask``, ``position_embeddings`` and ``past_key_values``, as those of
    transformers are; nothing is added to visual tokens between layers (else set ``min_stage`` after that layer).
    SmolVLM and Idefics3 are tested so, in both modes. Gemma 3, whose image tokens see each other, works in compact
    mode with "sdpa" and "eager"; what would be wrong is refused: mask mode, "flex_attention", images on a filled cache.

    Before you trust a new row, compare a keep-all schedule with the unattached model, and compact mode with mask mode.

    Args:
        family: the row; it replaces an earlier one of the same ``model_class``.

    Raises:
        TypeError: ``family`` is not a Family.

    Example:
        >>> from toprl_models import Family, register_family
        >>> register_family(Family("SmolVLMForConditionalGeneration", "SmolVLM", "All tokens of every tile."))
    """
    if not isinstance(family, Family):
        raise TypeError(f"family is a {type(family).__name__}; pass a toprl_models.Family")
    FAMILIES[family.model_class] = family


def family_of(model: PreTrainedModel) -> Family:
    """Return the family row of ``model``.

    Raises:
        TypeError: neither the class nor a base class has a row; the message lists those that have.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    hint = "A class that is built alike can be added with toprl_models.register_family(Family(...))."
    if type(model).__name__.startswith("Peft"):
        hint = "A PEFT model: pass model.get_base_model()."
    raise TypeError(
        f"model is a {type(model).__name__}, which is not supported; supported: {', '.join(sorted(FAMILIES))}. {hint}"
    )


def min_stage_of(model: PreTrainedModel, family: Family) -> int:
    """Return the first layer of ``model`` that may prune."""
    return family.min_stage(model) if callable(family.min_stage) else family.min_stage


def visual_token_ids(model: PreTrainedModel, family: Family) -> tuple[int, ...]:
    """Return the token ids that stand for visual tokens in ``input_ids``.

    Raises:
        ValueError: the model's config has none of the family's attributes.
    """
    ids = tuple(
        getattr(model.config, name) for name in family.visual_ids if getattr(model.config, name, None) is not None
    )
    if not ids:
        raise ValueError(
            f"model: config of {type(model).__name__} has none of {', '.join(family.visual_ids)}; name the attribute "
            "that holds the placeholder id in Family(visual_ids=...)"
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
    ids = torch.tensor(visual_token_ids(model, family_of(model)), device=inputs["input_ids"].device)
    visual = torch.isin(inputs["input_ids"], ids)
    if inputs.get("attention_mask") is not None:
        visual &= inputs["attention_mask"].bool()
    return visual.sum(1).tolist()


def video_token_ids(model: PreTrainedModel, family: Family) -> tuple[int, ...]:
    """Return the ``visual_token_ids`` that stand for videos only, if the model takes videos as separate arguments."""
    if "pixel_values_videos" not in inspect.signature(model.base_model.forward).parameters:
        return ()
    kinds: dict[int, set[bool]] = {}
    for name in family.visual_ids:
        if (number := getattr(model.config, name, None)) is not None:
            kinds.setdefault(number, set()).add("video" in name)
    return tuple(number for number, is_video in kinds.items() if is_video == {True})


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the text decoder, the module with ``layers``."""
    return model.get_decoder()


def has_plain_positions(decoder: PreTrainedModel) -> bool:
    """Tell whether positions count tokens; M-RoPE's are places in images and moments of videos."""
    parameters = getattr(decoder.config, "rope_parameters", None) or {}
    return "mrope_section" not in parameters


def has_kinds_of_positions(decoder: PreTrainedModel) -> bool:
    """Tell whether rotary tables differ by kind of layer, as in Gemma 3."""
    return "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
