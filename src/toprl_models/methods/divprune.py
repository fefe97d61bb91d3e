"""DivPrune (Alvar et al., CVPR 2025, "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from toprl_models.methods._tower import after_first_layers, check_before_llm
from toprl_models.policy import Policy, StageContext
from toprl_models.registry import BEFORE_LLM, register_method
from toprl_models.schedule import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_method("divprune", "DivPrune", "Alvar et al., CVPR 2025", stages=BEFORE_LLM, refuses=after_first_layers)
class DivPrune(Policy):
    """Keep the most diverse tokens: greedy max-min selection over the projected visual embeddings, before layer 0.

    Distance: 1 - cosine. The first pick is the token farthest from its nearest neighbour; then always the one farthest
    from its nearest pick. The authors keep .333/.222/.111 of 576 tokens for 192/128/64. Neither the question nor
    attention counts.

    Deviations: kept tokens stay in raster order, as in the authors' released code (their published runs had them in
    order of picking); equal distances go to the lower slot; distances are float32, whatever the model's dtype.
    """

    positions = "renumbered"
    uses_text = False

    def score(self, context: StageContext) -> Tensor:
        """Score a token by minus the place at which it is picked: 0, -1, ...; -V for tokens that no row needs."""
        return -pick_order(context.hidden_states, context.valid_mask, max(context.num_keep)).float()

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        check_before_llm(self, schedule)


def pick_order(states: Tensor, valid: Tensor, num_picks: int) -> Tensor:
    """Number the tokens in the order of greedy max-min selection.

    Args:
        states: ``[B, V, d]``.
        valid: bool ``[B, V]``, False for padding.
        num_picks: where to stop.

    Returns:
        int64 ``[B, V]``: 0 for the first pick of its row; V where it is not picked.
    """
    unit = normalize(states.float(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    others = valid[:, None] & ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    # [B, V], -inf for padding, which cannot be picked
    remote = distance.masked_fill(~others, torch.inf).amin(-1).masked_fill(~valid, -torch.inf)
    nearest = torch.full_like(remote, torch.inf).masked_fill(~valid, -torch.inf)
    order = torch.full_like(valid, valid.shape[1], dtype=torch.int64)
    for number in range(num_picks):
        pick = (nearest if number else remote).argmax(1, keepdim=True)
        # a row that has run out of tokens repeats a token, whose first place counts
        order.scatter_reduce_(1, pick, torch.full_like(pick, number), "amin")
        to_pick = distance.gather(1, pick[..., None].expand(-1, 1, valid.shape[1])).squeeze(1)
        nearest = torch.minimum(nearest, to_pick).scatter(1, pick, -torch.inf)
    return order
