"""VisPruner (Zhang et al., ICCV 2025, "Beyond Text-Visual Attention: Exploiting Visual Cues ...")."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from toprl_models.methods._tiles import Tile, TilePolicy
from toprl_models.methods._tower import after_first_layers
from toprl_models.registry import BEFORE_LLM, register_method

# Duplicates that a round removes
AT_ONCE = 8


@register_method(
    "vispruner",
    "VisPruner",
    "Zhang et al., ICCV 2025",
    stages=BEFORE_LLM,
    refuses=after_first_layers,
    inputs=("images",),
)
class VisPruner(TilePolicy):
    """Keep the patches that the vision tower attended to most, and of the others those that are no duplicates.

    ``important_ratio`` of a tile's tokens, rounded down, are those with most attention of the class token (FasterVLM's
    score). The rest, by descending attention, are divided into every other one and its complement; up to 8 of the
    former with the largest cosine to any of the latter are removed, and what is left is divided again, until the budget
    is met. Cosines are of the tower's states before the projector.

    Deviations: where the tower has no class token or a token is several patches, attention is that of ``TowerPolicy``
    and cosines are of the projected tokens. Attention and cosines are in float32, theirs in the model's precision.

    Errors and use are those of ``TowerPolicy``.

    Args:
        important_ratio: share of the tokens that are chosen by attention.

    Raises:
        ValueError: ``important_ratio`` outside [0, 1].
    """

    def __init__(self, important_ratio: float = 0.5) -> None:
        if not 0 <= important_ratio <= 1:
            raise ValueError(f"important_ratio={important_ratio} must be in [0, 1]")
        self.important_ratio = important_ratio

    def choose(self, tile: Tile, keep: int) -> Tensor:
        important = int(keep * self.important_ratio)
        order = tile.scores.argsort(descending=True, stable=True)
        unit, rest = normalize(tile.states.float(), dim=-1), order[important:]
        while (surplus := len(rest) - (keep - important)) > 0:
            former, latter = rest[::2], rest[1::2]
            if not len(latter):  # one token, which nothing resembles
                return order[:important]
            likeness = (unit[former] @ unit[latter].T).amax(1)
            number = min(AT_ONCE, surplus, len(former))
            rest = torch.cat([former[likeness.argsort(descending=True, stable=True)[number:]], latter])
        return torch.cat([order[:important], rest])
