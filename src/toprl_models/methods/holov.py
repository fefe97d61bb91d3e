"""HoloV (Zou et al., NeurIPS 2025, "Don't Just Chase 'Highlighted Tokens' in MLLMs ...")."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from toprl_models.methods._tiles import Tile, TilePolicy
from toprl_models.methods._tower import after_first_layers
from toprl_models.registry import BEFORE_LLM, register_method

# Factor of attention in the authors' code, which matters for crops of one token alone
SCALE = 1e3
# Added to denominators, as by the authors
LEAST = 1e-6


@register_method(
    "holov", "HoloV", "Zou et al., NeurIPS 2025", stages=BEFORE_LLM, refuses=after_first_layers, inputs=("images",)
)
class HoloV(TilePolicy):
    """Share the tokens among crops of a picture, and keep in each those that the vision tower attended to most.

    Crops are runs of tokens in raster order, of equal length. The score of a token is its attention plus ``alpha``
    times the variance of its cosines with the other tokens of its crop, the variances scaled to the crop's mean
    attention; a crop's share is in proportion to the mean score of its tokens, rounded down, and what is left goes to
    the crops with the largest shares, one token each.

    Deviations: the authors drop the tokens of a share that is larger than its crop and append zeros instead; here they
    go to the other crops, those with the largest shares first. Kept tokens are in raster order, theirs in the order of
    attention within a crop. The authors crop all tiles of a picture together, here each tile has ``crops``.

    Errors and use are those of ``TowerPolicy``.

    Args:
        crops: number of crops.
        alpha: weight of the variances.

    Raises:
        ValueError: ``crops`` below 1.
    """

    def __init__(self, crops: int = 16, alpha: float = 0.09) -> None:
        if crops < 1:
            raise ValueError(f"crops={crops} must be at least 1")
        self.crops, self.alpha = crops, alpha

    def choose(self, tile: Tile, keep: int) -> Tensor:
        numbers = torch.arange(len(tile.scores), device=tile.scores.device)
        parts = [part for part in numbers.tensor_split(self.crops) if len(part)]
        merits = torch.stack([self.merit(tile.projected[part].float(), tile.scores[part]) for part in parts])
        shares = self.shares(merits, [len(part) for part in parts], keep)
        chosen = [
            part[tile.scores[part].argsort(descending=True, stable=True)[:share]]
            for part, share in zip(parts, shares, strict=True)
        ]
        return torch.cat(chosen)

    def merit(self, states: Tensor, attention: Tensor) -> Tensor:
        """Compute the mean score of the tokens of a crop; ``states`` [n, d], ``attention`` [n]."""
        if len(attention) == 1:
            return attention.mean()
        unit = normalize(states, dim=-1)
        cosine = (unit @ unit.T).fill_diagonal_(0)
        others = len(attention) - 1
        mean = cosine.sum(1, keepdim=True) / others
        variance = (cosine - mean).square().sum(1) / others  # of all n entries, as by the authors
        scaled = attention * SCALE
        ratio = scaled.abs().mean() / (variance.abs().mean() + LEAST)
        return (scaled + self.alpha * ratio * variance).mean()

    @staticmethod
    def shares(merits: Tensor, sizes: list[int], keep: int) -> list[int]:
        """Divide ``keep`` tokens among crops of ``sizes``."""
        weights = merits / (merits.sum() + LEAST)
        shares = [min(int(weight * keep), size) for weight, size in zip(weights.tolist(), sizes, strict=True)]
        order = weights.argsort(descending=True, stable=True).tolist()
        left = keep - sum(shares)
        while left > 0:
            for crop in order:
                if left and shares[crop] < sizes[crop]:
                    shares[crop] += 1
                    left -= 1
        return shares
