"""The supported model families: one row each. A family needs no code of its own, only to know where things are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """Where the pruner finds what it needs in one class of models.

    Attributes:
        model_class: name of the transformers class.
        visual_ids: config attributes that hold the placeholder ids; a token with such an id is a visual token.
        min_stage: first layer that may prune. Layer 0 never may: transformers reads the cache's length from it.
    """

    model_class: str
    visual_ids: tuple[str, ...] = ("image_token_id",)
    min_stage: int = 1


FAMILIES: dict[str, Family] = {
    family.model_class: family
    for family in (
        # every placeholder is one CLIP patch; nothing is interleaved between the patches
        Family("LlavaForConditionalGeneration"),
    )
}


def family_of(model: PreTrainedModel) -> Family:
    """The family row of ``model``.

    Raises:
        TypeError: the class (or a base class of it) has no row; the message lists those that have.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    hint = ""
    if type(model).__name__.startswith("Peft"):
        hint = " A PEFT model: pass model.get_base_model()."
    raise TypeError(
        f"model is a {type(model).__name__}, which is not supported; supported: {', '.join(sorted(FAMILIES))}.{hint}"
    )


def visual_token_ids(model: PreTrainedModel, family: Family) -> tuple[int, ...]:
    """Token ids that stand for visual tokens in ``input_ids``."""
    return tuple(
        getattr(model.config, name) for name in family.visual_ids if getattr(model.config, name, None) is not None
    )


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The text decoder (the module that owns ``layers``)."""
    return model.get_decoder()
