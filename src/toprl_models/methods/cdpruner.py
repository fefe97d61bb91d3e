"""CDPruner (Zhang et al., NeurIPS 2025, "Beyond Attention or Similarity: Maximizing Conditional Diversity ...")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from toprl_models.methods._tower import after_first_layers, check_before_llm
from toprl_models.policy import Policy, PromptEmbeddings, StageContext
from toprl_models.registry import BEFORE_LLM, register_method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule

# Added to relevances, as by the authors, so that the least relevant token can be picked
LEAST = 1e-6
# Smallest variance that is divided by: below, the tokens picked so far explain a token entirely
EXPLAINED = 1e-12


@register_method("cdpruner", "CDPruner", "Zhang et al., NeurIPS 2025", stages=BEFORE_LLM, refuses=after_first_layers)
class CDPruner(Policy):
    """Keep a diverse set of tokens that are relevant to the question, before layer 0.

    Greedy MAP inference of a determinantal point process whose kernel is r_i cos(v_i, v_j) r_j: v are the projected
    visual embeddings, r is the relevance, scaled to [0, 1] over the prompt's tokens.

    Deviations: the relevance is the cosine of a token with the question tokens' embeddings in the language model, mean
    over them. The authors' code for LLaVA embeds the question by the text tower that CLIP was trained with, which
    checkpoints of such models do not hold, and takes the negative of that cosine. Scaling and selection are over all
    tokens of a prompt, theirs tile by tile; in float64, theirs in float32.
    """

    positions = "renumbered"

    def score(self, context: StageContext) -> Tensor:
        """Score a token by minus the place at which it is picked: 0, -1, ...; -V for tokens that no row needs."""
        states = normalize(context.hidden_states.detach().double(), dim=-1)
        relevance = relevance_of(context.prompt()).gather(1, context.visual_index.clamp(min=0))
        kernel = relevance[..., None] * (states @ states.transpose(1, 2)) * relevance[:, None]
        return -determinantal_order(kernel, context.valid_mask, max(context.num_keep)).float()

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        check_before_llm(self, schedule)


def relevance_of(prompt: PromptEmbeddings) -> Tensor:
    """Compute the relevance of the visual tokens to the question: float64 ``[B, V0]``, from 0 to 1 in each row."""
    visual, text = (normalize(part.detach().double(), dim=-1) for part in (prompt.visual, prompt.text))
    weight = prompt.text_valid[:, None].double()
    cosine = (visual @ text.transpose(1, 2) * weight).sum(-1) / weight.sum(-1).clamp(min=1)
    low = cosine.masked_fill(~prompt.visual_valid, torch.inf).amin(1, keepdim=True)
    high = cosine.masked_fill(~prompt.visual_valid, -torch.inf).amax(1, keepdim=True)
    scaled = (cosine - low + LEAST) / (high - low).clamp(min=LEAST)
    return scaled.masked_fill(~prompt.visual_valid, 0)


def determinantal_order(kernel: Tensor, valid: Tensor, num_picks: int) -> Tensor:
    """Number the items in the order in which they raise the determinant of the picked ones' kernel most.

    The greedy algorithm of Chen et al. (NeurIPS 2018), by an incremental Cholesky factor.

    Args:
        kernel: positive semidefinite, ``[B, V, V]``.
        valid: bool ``[B, V]``, False for padding.
        num_picks: where to stop.

    Returns:
        int64 ``[B, V]``: 0 for the first pick of its row; V where it is not picked.
    """
    batch, length = valid.shape
    variance = kernel.diagonal(dim1=1, dim2=2).masked_fill(~valid, -torch.inf)
    factor = kernel.new_zeros(batch, num_picks, length)
    order = torch.full_like(valid, length, dtype=torch.int64)
    for number in range(num_picks):
        pick = variance.argmax(1, keepdim=True)
        # a row that has run out of tokens repeats a token, whose first place counts
        order.scatter_reduce_(1, pick, torch.full_like(pick, number), "amin")
        row = kernel.gather(1, pick[..., None].expand(-1, 1, length))[:, 0]
        before = factor.gather(2, pick[:, None].expand(-1, num_picks, 1))
        left = row - (before * factor).sum(1)
        factor[:, number] = left / variance.gather(1, pick).clamp(min=EXPLAINED).sqrt()
        variance = (variance - factor[:, number].square()).scatter(1, pick, -torch.inf)
    return order
