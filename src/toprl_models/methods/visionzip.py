"""VisionZip (Yang et al., CVPR 2025, "Longer is better but not necessary in vision language models")."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from toprl_models.methods._tower import KEPT, TowerPolicy, TowerReading, after_first_layers
from toprl_models.policy import Decision, StageContext
from toprl_models.registry import BEFORE_LLM, register_method
from toprl_models.runtime.state import gather_slots

# 30 of 192, 20 of 128, 10 of 64 and, for a tile of LLaVA-NeXT, 5 of 32: each is this share exactly
AUTHORS_RATIO = 5 / 32


def zip_tiles(
    states: Tensor, keys: Tensor, attention: Tensor, num_dominant: int, num_contextual: int
) -> tuple[Tensor, Tensor]:
    """Choose the dominant and make the contextual tokens of tiles of P patches each.

    Dominant are the patches with most attention, in raster order. Of the others every
    ``(number of others) // num_contextual``-th is a target; the rest join the target whose key has the largest cosine,
    and a contextual token is the target plus the mean of those that joined it.

    Args:
        states: ``[G, P, d]`` of the patches.
        keys: ``[G, P, head_dim]``, mean over heads.
        attention: ``[G, P]``.
        num_dominant: number of patches that stay as they are.
        num_contextual: with the dominant ones at most P.

    Returns:
        Tokens ``[G, num_dominant + num_contextual, d]``, the contextual ones last; and int64, of the same shape without
        d, the patches that were chosen and the targets, in the same order.
    """
    by_attention = attention.argsort(dim=1, descending=True, stable=True)
    dominant = by_attention[:, :num_dominant].sort(1).values
    others = by_attention[:, num_dominant:].sort(1).values  # [G, n], raster order
    tokens = [gather_slots(states, dominant)]
    if not num_contextual:
        return tokens[0], dominant
    stride = max(1, others.shape[1] // num_contextual)
    is_target = torch.zeros(others.shape[1], dtype=torch.bool, device=others.device)
    is_target[torch.arange(num_contextual, device=others.device) * stride] = True
    targets, joining = others[:, is_target], others[:, ~is_target]
    metric = normalize(keys.float(), dim=-1)
    cosine = gather_slots(metric, joining) @ gather_slots(metric, targets).transpose(1, 2)  # [G, n - c, c]
    joins = one_hot(cosine.argmax(-1), num_contextual).to(states.dtype)
    sizes = joins.sum(1).clamp(min=1)[..., None]
    tokens.append(gather_slots(states, targets) + joins.transpose(1, 2) @ gather_slots(states, joining) / sizes)
    return torch.cat(tokens, 1), torch.cat([dominant, targets], 1)


def _hosts(chosen: Tensor, num_patches: int, count: int) -> Tensor:
    """Pick the patches whose slots take tokens, int64 ``[G, count]``: ``chosen``, then the first others."""
    is_free = torch.ones(len(chosen), num_patches, dtype=torch.bool, device=chosen.device)
    is_free.scatter_(1, chosen, False)
    free = is_free.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return torch.cat([chosen, free[:, : count - chosen.shape[1]]], 1)


@register_method(
    "visionzip",
    "VisionZip",
    "Yang et al., CVPR 2025",
    stages=BEFORE_LLM,
    refuses=after_first_layers,
    inputs=("images",),
)
class VisionZip(TowerPolicy):
    """Keep the patches that the vision tower attended to most, and merge the others into a few tokens.

    Attention, keys and states are those of the layer whose output the projector gets (layer L - 2 of the released
    LLaVAs); tokens are chosen and merged before the projector (``zip_tiles``) and then go through it, class token
    included. Of k tokens ``floor(contextual_ratio * k + 1/2)``, but never all, are contextual: with the default the
    authors' 162 + 30, 108 + 20, 54 + 10 and, per tile of LLaVA-NeXT, 27 + 5; other budgets are split in the same
    proportion. As the authors' tokens enter the language model, survivors get consecutive positions.

    Towers without a class token, and models that merge patches into tokens: attention that patches receive, averaged
    over heads and queries, and then like the keys over the patches of a token (``TowerPolicy``), as in the authors'
    code for Qwen2.5-VL. Tokens are chosen and merged after the projector, and every one has its own slot: a contextual
    token that of its target. Features that a decoder adds later (Qwen3-VL's deepstack) are those of that slot.

    The tokens of a row are shared among its tiles (of all its images) by ``tile_shares``, in proportion to the tokens
    that the tower made of each; the authors give each of 5 tiles the same number. With a class token, the tokens of an
    image stand in the authors' order, tile by tile: class token, dominant patches in raster order, contextual tokens.
    Their slots, and so the raster numbers in the trace, are those of the dominant patches and of the targets, and for
    the class token that of the tile's first other patch.

    Newline features are dropped, as by the authors; they stay only where there are more tokens to keep than patches. A
    row that keeps all its tokens is left as it is.

    Deviations: the paper says that merged tokens are averaged, the authors' code adds the mean to the target, as here.
    Attention and cosines are in float32, theirs in the model's precision. Keys are as the attention function gets them:
    with rotary positions where the tower has them. The authors do not unpad the tiles of LLaVA-NeXT; here patches that
    the model itself leaves out are neither chosen nor merged.

    Errors and use are those of ``TowerPolicy``.

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
        scores, states = reading.scores.clone(), context.hidden_states[:: reading.repeats].clone()
        if any(shares):
            tokens, slots = self._tokens(reading, states if reading.states is None else reading.states, shares)
            if reading.class_states is not None:
                # images follow each other in the slots; within each, the tokens keep the order of the tiles
                tokens, slots = self._reader.project(tokens), slots.sort().values
            states.view(-1, states.shape[-1])[slots] = tokens.to(states.dtype)
            scores.view(-1)[slots] += KEPT
        return Decision(
            scores.repeat_interleave(reading.repeats, 0), states=states.repeat_interleave(reading.repeats, 0)
        )

    def _tokens(self, reading: TowerReading, states: Tensor, shares: list[int]) -> tuple[Tensor, Tensor]:
        """Make the tokens ``[M, d]``, tile after tile, and find their slots ``[M]``, ``row * V + slot``."""
        states, of_class, slots_of = states.flatten(0, 1), reading.class_states, reading.slots_of_tiles()
        tokens, hosts = [states[:0]] * len(shares), [slots_of[0][:0]] * len(shares)
        alike = defaultdict(list)
        for tile, size in enumerate(zip(shares, reading.capacities, strict=True)):
            if size[0]:
                alike[size].append(tile)
        for (count, _), group in alike.items():
            slots = torch.stack([slots_of[tile] for tile in group])  # [G, P]
            dominant, contextual = self.split(count)
            zipped, chosen = zip_tiles(
                states[slots],
                reading.keys.flatten(0, 1)[slots],
                reading.scores.flatten()[slots],
                dominant - (of_class is not None),
                contextual,
            )
            if of_class is not None:
                zipped = torch.cat([of_class[group][:, None], zipped], 1)
            places = slots.gather(1, _hosts(chosen, slots.shape[1], count))
            for place, tile in enumerate(group):
                tokens[tile], hosts[tile] = zipped[place], places[place]
        return torch.cat(tokens), torch.cat(hosts)
