"""ToMe (Bolya et al., ICLR 2023, "Token Merging: Your ViT But Faster"), on the tokens before the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from toprl_models.methods._tower import after_first_layers, check_before_llm, check_merging
from toprl_models.policy import Decision, Policy, StageContext
from toprl_models.registry import BEFORE_LLM, register_method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule


@register_method("tome", "ToMe", "Bolya et al., ICLR 2023", stages=BEFORE_LLM, refuses=after_first_layers)
class ToMe(Policy):
    """Merge the most similar tokens until the budget is met, before layer 0.

    Bipartite soft matching: every other token, from the first, points to the token of the rest with the largest cosine;
    the pairs with the largest cosines merge into the latter, by means weighted with the patches that a token stands
    for. A round merges at most half of the tokens, and rounds follow until ``num_keep`` are left.

    Deviations: the authors merge some tokens in each layer of the vision tower, by the cosine of its keys, and add the
    logarithm of the sizes to its attention; here the projected tokens are merged and compared. Between rounds, tokens
    are in raster order. A merged token stands in the slot of the token that the others pointed to.
    """

    positions = "renumbered"
    uses_text = False

    def decide(self, context: StageContext) -> Decision:
        """Score by the patches that a token stands for; 0 for those that were merged into others."""
        states = context.hidden_states.clone()
        sizes = torch.zeros_like(context.valid_mask, dtype=torch.float32)
        for row, (valid, keep) in enumerate(zip(context.valid_mask, context.num_keep, strict=True)):
            slots = valid.nonzero()[:, 0]
            if keep:
                tokens, size, left = merged(states[row, slots], keep)
                states[row, slots[left]] = tokens.to(states.dtype)
                sizes[row, slots[left]] = size.to(sizes.dtype)
        return Decision(sizes, states=states)

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        check_before_llm(self, schedule)
        check_merging(self, schedule)


def merged(tokens: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``tokens`` ``[n, d]`` until ``keep`` >= 1 are left, computed in float32 at least.

    Returns:
        The tokens ``[keep, d]``, the number of tokens that each stands for ``[keep]``, and their places, ascending.
    """
    places = torch.arange(len(tokens), device=tokens.device)
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    sizes = tokens.new_ones(len(tokens))
    while len(tokens) > keep:
        number = min(len(tokens) - keep, len(tokens) // 2)
        unit = normalize(tokens, dim=-1)
        nearest, target = (unit[::2] @ unit[1::2].T).max(-1)
        source = nearest.argsort(descending=True, stable=True)[:number]
        host = 2 * target[source] + 1
        sums = tokens * sizes[:, None]
        sums = sums.index_add(0, host, sums[2 * source])
        sizes = sizes.index_add(0, host, sizes[2 * source])
        stays = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        stays[2 * source] = False
        tokens, sizes, places = sums[stays] / sizes[stays, None], sizes[stays], places[stays]
    return tokens, sizes, places
