"""VisionZip (Yang et al., CVPR 2025, "Longer is better but not necessary in vision language models")."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from toprl_models.methods._tower import KEPT, ClassTokenPolicy, TileReading, no_choice_by_class_token
from toprl_models.policy import Decision, StageContext
from toprl_models.registry import BEFORE_LLM, register_method
from toprl_models.runtime.state import gather_slots

# 30 of 192, 20 of 128, 10 of 64 and, for a tile of LLaVA-NeXT, 5 of 32: each is this share exactly
AUTHORS_RATIO = 5 / 32


def zip_tiles(
    states: Tensor, keys: Tensor, attention: Tensor, num_dominant: int, num_contextual: int
) -> tuple[Tensor, Tensor]:
    """Choose the dominant and make the contextual tokens of tiles of P patches each.

    Dominant are the class token and the patches with most attention, in raster order. Of the others every
    ``(number of others) // num_contextual``-th is a target; the rest join the target whose key has the largest cosine,
    and a contextual token is the target plus the mean of those that joined it.

    Args:
        states: ``[G, P + 1, d]``, class token first.
        keys: ``[G, P, head_dim]``, mean over heads.
        attention: ``[G, P]`` of the class token.
        num_dominant: class token included, at least 1.
        num_contextual: with the dominant ones at most P.

    Returns:
        Tokens ``[G, num_dominant + num_contextual, d]``, the contextual ones last; and int64
        ``[G, num_dominant - 1 + num_contextual]``, the patches that were chosen and the targets, in the same order.
    """
    patches = states[:, 1:]
    by_attention = attention.argsort(dim=1, descending=True, stable=True)
    dominant = by_attention[:, : num_dominant - 1].sort(1).values
    others = by_attention[:, num_dominant - 1 :].sort(1).values  # [G, n], raster order
    tokens = [states[:, :1], gather_slots(patches, dominant)]
    if not num_contextual:
        return torch.cat(tokens, 1), dominant
    stride = max(1, others.shape[1] // num_contextual)
    is_target = torch.zeros(others.shape[1], dtype=torch.bool, device=others.device)
    is_target[torch.arange(num_contextual, device=others.device) * stride] = True
    targets, joining = others[:, is_target], others[:, ~is_target]
    metric = normalize(keys.float(), dim=-1)
    cosine = gather_slots(metric, joining) @ gather_slots(metric, targets).transpose(1, 2)  # [G, n - c, c]
    joins = one_hot(cosine.argmax(-1), num_contextual).to(patches.dtype)
    sizes = joins.sum(1).clamp(min=1)[..., None]
    tokens.append(gather_slots(patches, targets) + joins.transpose(1, 2) @ gather_slots(patches, joining) / sizes)
    return torch.cat(tokens, 1), torch.cat([dominant, targets], 1)


def _hosts(chosen: Tensor, num_patches: int, count: int) -> Tensor:
    """Pick the patches whose slots take tokens, int64 ``[G, count]``: ``chosen``, then the first others."""
    is_free = torch.ones(len(chosen), num_patches, dtype=torch.bool, device=chosen.device)
    is_free.scatter_(1, chosen, False)
    free = is_free.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return torch.cat([chosen, free[:, : count - chosen.shape[1]]], 1)


@register_method(
    "visionzip", "VisionZip", "Yang et al., CVPR 2025", stages=BEFORE_LLM, refuses=no_choice_by_class_token
)
class VisionZip(ClassTokenPolicy):
    """Keep the patches that the vision tower's class token attended to most, and merge the others into a few tokens.

    Attention, keys and states are those of the layer whose output the projector gets (layer L - 2 of the released
    LLaVAs); tokens are chosen and merged before the projector (``zip_tiles``) and then go through it, class token
    included. Of k tokens ``floor(contextual_ratio * k + 1/2)``, but never all, are contextual: with the default the
    authors' 162 + 30, 108 + 20, 54 + 10 and, per tile of LLaVA-NeXT, 27 + 5; other budgets are split in the same
    proportion. As the authors' tokens enter the language model, survivors get consecutive positions.

    The tokens of a row are shared evenly among its tiles (of all its images) by ``tile_shares``; the authors give each
    of 5 tiles the same number. The tokens of an image stand in the authors' order, tile by tile: class token, dominant
    patches in raster order, contextual tokens. Their slots, and so the raster numbers in the trace, are those of the
    dominant patches and of the targets, and for the class token that of the tile's first other patch.

    Newline features of LLaVA-NeXT are dropped, as by the authors; they stay only where there are more tokens to keep
    than patches. A row that keeps all its tokens is left as it is.

    Deviations: the paper says that merged tokens are averaged, the authors' code adds the mean to the target, as here.
    Attention and cosines are in float32, theirs in the model's precision. The authors do not unpad the tiles of
    LLaVA-NeXT; here patches that the model itself leaves out are neither chosen nor merged.

    Errors and use are those of ``ClassTokenPolicy``.

    Args:
        contextual_ratio: share of merged tokens.

    Raises:
        ValueError: ``contextual_ratio`` outside [0, 1).
    """

    def __init__(self, contextual_ratio: float = AUTHORS_RATIO) -> None:
        if not 0 <= contextual_ratio < 1:
            raise ValueError(f"contextual_ratio={contextual_ratio} must be in [0, 1)")
        self.contextual_ratio = contextual_ratio

    def split(self, num_tokens: int) -> tuple[int, int]:
        """Count dominant (class token included) and contextual tokens of a tile that keeps ``num_tokens`` >= 1."""
        contextual = min(num_tokens - 1, math.floor(self.contextual_ratio * num_tokens + 0.5))
        return num_tokens - contextual, contextual

    def decide(self, context: StageContext) -> Decision:
        """Score by attention, mean over heads (the authors' sum ranks alike), 2 more for the new tokens' slots."""
        reading = self._reader.read(self, context)
        shares = reading.shares(context.num_keep)
        for row, tiles in enumerate(reading.tiles):
            if context.num_keep[row * reading.repeats] == context.num_visual[row * reading.repeats]:
                shares[tiles.start : tiles.stop] = [0] * len(tiles)  # nothing to merge
        scores = reading.of_slots(reading.attention.mean(1), missing=-1)
        states = context.hidden_states[:: reading.repeats].clone()
        if any(shares):
            tokens, slots = self._tokens(reading, shares)
            # images follow each other in the slots; within each, the tokens keep the order of the tiles
            slots = slots.sort().values
            states.view(-1, states.shape[-1])[slots] = self._reader.project(tokens).to(states.dtype)
            scores.view(-1)[slots] += KEPT
        return Decision(
            scores.repeat_interleave(reading.repeats, 0), states=states.repeat_interleave(reading.repeats, 0)
        )

    def _tokens(self, reading: TileReading, shares: list[int]) -> tuple[Tensor, Tensor]:
        """Make the tokens ``[M, d]``, tile after tile, and find their slots ``[M]``, ``row * V + slot``."""
        tokens, slots = [reading.states[:0, 0]] * len(shares), [reading.patch_slot[:0, 0]] * len(shares)
        alike = defaultdict(list)
        for tile, size in enumerate(zip(shares, reading.capacities, strict=True)):
            if size[0]:
                alike[size].append(tile)
        keys, attention = reading.keys.mean(2), reading.attention.mean(1)
        for (count, capacity), group in alike.items():
            slots_of_group = reading.patch_slot[group]  # [G, P]
            patches = (slots_of_group < 0).to(torch.int8).argsort(dim=1, stable=True)[:, :capacity]
            states = reading.states[group]
            zipped, chosen = zip_tiles(
                torch.cat([states[:, :1], gather_slots(states[:, 1:], patches)], 1),
                gather_slots(keys[group], patches),
                attention[group].gather(1, patches),
                *self.split(count),
            )
            hosts = patches.gather(1, _hosts(chosen, capacity, count))
            for place, tile in enumerate(group):
                tokens[tile], slots[tile] = zipped[place], slots_of_group[place][hosts[place]]
        return torch.cat(tokens), torch.cat(slots)
