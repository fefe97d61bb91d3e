"""HiPrune (Liu et al., arXiv 2508.00553, "HiPrune: ... Hierarchical Attention in Vision Encoders")."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from toprl_models.methods._layout import has_class_token, image_tower, read_layer
from toprl_models.methods._tiles import LayersPolicy, Tile, layer_at
from toprl_models.methods._tower import after_first_layers, mean_attention, sequences
from toprl_models.registry import BEFORE_LLM, register_method
from toprl_models.runtime.scores import Observation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_method(
    "hiprune", "HiPrune", "arXiv 2508.00553", stages=BEFORE_LLM, refuses=after_first_layers, inputs=("images",)
)
class HiPrune(LayersPolicy):
    """Keep anchors with their neighbours by a middle layer of the vision tower, the rest by a deep one.

    Anchors are the ``round(alpha * tokens / 5)`` patches that receive most attention in the middle layer, mean over
    heads and over all queries; with each stay the tokens before and after it in raster order and those above and below
    it. The others are the patches that receive most in the layer whose output the projector gets.

    The middle layer is the 9th of CLIP's 24, else the one at half of the depth, as the authors set it for Qwen2.5-VL.

    Deviations: of merged patches attention is the mean. In a tower with windows the middle layer is the nearest one
    that attends to all. Each tile has its share of the tokens, by its size.

    Errors and use are those of ``TowerPolicy``.

    Args:
        alpha: share of anchors and their neighbours.
        depth: where the middle layer is, from 0 to 1; None for the authors' choice.

    Raises:
        ValueError: ``alpha`` or ``depth`` outside [0, 1].
    """

    def __init__(self, alpha: float = 0.1, depth: float | None = None) -> None:
        if not 0 <= alpha <= 1 or not 0 <= (depth or 0) <= 1:
            raise ValueError(f"alpha={alpha} and depth={depth} must be in [0, 1]")
        self.alpha, self.depth = alpha, depth

    def layers(self, model: PreTrainedModel) -> list[nn.Module]:
        tower = image_tower(model)
        depth = (9 / 24 if has_class_token(tower) else 0.5) if self.depth is None else self.depth
        return [layer_at(model, depth), read_layer(model.config, tower)]

    def read(self, calls: Sequence[Observation], has_class_token: bool) -> Tensor:
        """Return the attention that patches receive from all tokens, ``[N, 1]``."""
        parts = itertools.chain.from_iterable(map(sequences, calls))
        return torch.cat([mean_attention(part)[:, int(has_class_token) :].flatten() for part in parts])[:, None]

    def choose(self, tile: Tile, keep: int) -> Tensor:
        middle, deep = tile.extra.unbind(1)
        anchors = tile.places[middle.topk(round(keep * self.alpha / 5)).indices]
        rows, columns = tile.grid
        around = torch.tensor([0, -1, 1, -columns, columns], device=anchors.device)
        places = (anchors[:, None] + around).clamp(0, rows * columns - 1)
        first = torch.isin(tile.places, places).nonzero()[:, 0][:keep]
        rest = deep.index_fill(0, first, -torch.inf).topk(keep - len(first)).indices
        return torch.cat([first, rest])
