"""PruMerge+ (Shang et al., ICCV 2025, "LLaVA-PruMerge: Adaptive Token Reduction ...")."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from toprl_models.methods._tiles import LayersPolicy, Tile, kept_with, layer_at
from toprl_models.methods._tower import KEPT, WEIGHTS_AT_ONCE, after_first_layers, check_merging, sequences
from toprl_models.policy import Decision, StageContext
from toprl_models.registry import BEFORE_LLM, register_method
from toprl_models.runtime.scores import Observation, visible_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule

# Tokens that are merged into each
NEIGHBOURS = 32


@register_method(
    "prumerge_plus",
    "PruMerge+",
    "Shang et al., ICCV 2025",
    stages=BEFORE_LLM,
    refuses=after_first_layers,
    inputs=("images",),
)
class PruMergePlus(LayersPolicy):
    """Keep patches by attention and by place, and merge the others into them by the likeness of their keys.

    Of k tokens one gathers all that is dropped: the sum of the dropped patches, weighted with their attention. Half of
    the others, rounded up, are the patches with most attention of the class token; the rest are spread evenly over the
    patches that are left. To each is added the sum of its 32 nearest patches, kept ones included, weighted with their
    attention; near is by the cosine of keys. Keys and attention are those of the tower's last layer, with all heads as
    one: softmax of q k / sqrt(width). Tokens are merged before the projector.

    Deviations: the authors choose as many tokens by attention as there are outliers (above the third quartile by 1.5
    interquartile ranges), or a fixed number, and three times as many by place, some of them twice; here the budget is
    given and no token stands twice. Kept tokens are in raster order, theirs by attention; the one that gathers the rest
    takes the slot of the last dropped patch. Without a class token attention is that of all patches, and where a token
    is several patches keys and attention are their means and projected tokens are merged. A tile that keeps all its
    tokens is left as it is, one that keeps a single token keeps one by attention.

    Errors and use are those of ``TowerPolicy``.
    """

    def layers(self, model: PreTrainedModel) -> list[nn.Module]:
        return [layer_at(model, 1.0)]

    def read(self, calls: Sequence[Observation], has_class_token: bool) -> Tensor:
        """Return the attention of the patches and their keys, ``[N, 1 + width]``."""
        found, first = [], int(has_class_token)
        for part in itertools.chain.from_iterable(map(sequences, calls)):
            keys = part.key.float().transpose(1, 2).flatten(2)
            attention = wide_attention(part, has_class_token)
            found.append(torch.cat([attention[..., None], keys], 2)[:, first:].flatten(0, 1))
        return torch.cat(found)

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        super().check(model, schedule)
        check_merging(self, schedule)

    def decide(self, context: StageContext) -> Decision:
        reading, tiles = self._reader.read_layers(self, context)
        scores, projected = reading.scores.clone(), context.hidden_states[:: reading.repeats].clone()
        is_before = reading.states is not None
        for slots, tile, keep in tiles:
            chosen = slots
            if keep < len(slots):
                picks = self.choose(tile, keep)
                chosen, tokens = slots[picks], merged(tile, picks, keep > 1)
                tokens = self._reader.project(tokens.to(tile.states.dtype)) if is_before else tokens
                projected.view(-1, projected.shape[-1])[chosen] = tokens.to(projected.dtype)
            scores.view(-1)[chosen] += KEPT
        return kept_with(scores, projected, reading)

    def choose(self, tile: Tile, keep: int) -> Tensor:
        """Choose the patches; the last one is the slot of the token that gathers the rest, if ``keep`` > 1."""
        order = tile.extra[:, 0].argsort(descending=True, stable=True)
        if keep == 1:
            return order[:1]
        by_attention, others = order[: keep // 2], order[keep // 2 :].sort().values
        number = keep - 1 - len(by_attention)
        places = (2 * torch.arange(number, device=order.device) + 1) * len(others) // (2 * max(number, 1))
        left = torch.ones(len(order), dtype=torch.bool, device=order.device)
        chosen = torch.cat([by_attention, others[places]])
        left[chosen] = False
        return torch.cat([chosen, left.nonzero()[-1]])


def merged(tile: Tile, picks: Tensor, gathers: bool) -> Tensor:
    """Make the tokens ``[keep, d]`` of a tile, in float32 at least; the last one gathers the rest if ``gathers``."""
    states = tile.states.to(torch.promote_types(tile.states.dtype, torch.float32))
    attention, unit = tile.extra[:, 0].to(states.dtype), normalize(tile.extra[:, 1:], dim=-1)
    chosen = picks[:-1] if gathers else picks
    cosine = unit[chosen] @ unit.T
    cosine[torch.arange(len(chosen)), chosen] = -torch.inf  # itself is no neighbour
    near = cosine.topk(min(NEIGHBOURS, len(states) - 1)).indices  # [k, 32]
    tokens = states[chosen] + (states[near] * attention[near][..., None]).sum(1)
    if not gathers:
        return tokens
    dropped = torch.ones_like(attention).index_fill(0, chosen, 0) * attention
    return torch.cat([tokens, (dropped @ states)[None]])


def wide_attention(call: Observation, from_class_token: bool) -> Tensor:
    """Compute the attention that tokens receive with all heads as one: float32 ``[B, L]``.

    From the first token alone, or the mean over the tokens that see the key and are no padding themselves.
    """
    query, key = (part.float().transpose(1, 2).flatten(2) for part in (call.query, call.key))
    (batch, length), device = query.shape[:2], query.device
    step = 1 if from_class_token else max(1, WEIGHTS_AT_ONCE // (batch * length))
    received, number = torch.zeros(batch, length, device=device), torch.zeros(batch, length, device=device)
    for start in range(0, 1 if from_class_token else length, step):
        rows = torch.arange(start, min(start + step, length), device=device)
        visible = visible_rows(call.mask, rows.expand(batch, -1), length, 0, None)
        counted = visible & visible.diagonal(start, 1, 2)[..., None]
        logits = query[:, rows] @ key.transpose(1, 2) / query.shape[2] ** 0.5
        received += (logits.masked_fill(~visible, torch.finfo(torch.float32).min).softmax(-1) * counted).sum(1)
        number += counted.sum(1)
    return received / number.clamp(min=1)
