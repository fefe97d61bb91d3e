"""G-Prune (Jiang et al., AAAI 2025, "What Kind of Visual Tokens Do We Need? ... Perspective of Graph")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from toprl_models.methods._tower import after_first_layers, check_before_llm
from toprl_models.policy import Policy, StageContext
from toprl_models.registry import BEFORE_LLM, register_method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule


@register_method("gprune", "G-Prune", "Jiang et al., AAAI 2025", stages=BEFORE_LLM, refuses=after_first_layers)
class GPrune(Policy):
    """Keep the tokens in which information gathers when it flows between similar tokens, before layer 0.

    Tokens are the nodes of a graph; those whose cosine is at least ``similarity`` are neighbours, each its own one. A
    token passes its norm on in ``steps`` steps, in parts that are the softmax of cosine / ``temperature`` over its
    neighbours. What it then holds, divided by the number of its neighbours, is the score. Survivors keep their
    positions, as by the authors.

    Deviation: the graph has all tokens of a prompt, that of the authors has those of one tile, and they keep the
    newline features of LLaVA-NeXT whatever the budget.

    Args:
        similarity: least cosine of neighbours.
        temperature: of the softmax.
        steps: number of steps.

    Raises:
        ValueError: ``temperature`` is not positive, or ``steps`` is below 1.
    """

    uses_text = False

    def __init__(self, similarity: float = 0.5, temperature: float = 0.03, steps: int = 5) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive")
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        self.similarity, self.temperature, self.steps = similarity, temperature, steps

    def score(self, context: StageContext) -> Tensor:
        states, valid = context.hidden_states.float(), context.valid_mask
        unit = normalize(states, dim=-1)
        cosine = unit @ unit.transpose(1, 2)
        itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
        # rounding must not take a token from itself; a row of padding without a neighbour would be NaN
        neighbours = (valid[:, None] & valid[:, :, None] & (cosine >= self.similarity)) | itself
        parts = (cosine / self.temperature).masked_fill(~neighbours, -torch.inf).softmax(-1)
        held = (states.norm(dim=-1) * valid)[:, None]
        for _ in range(self.steps):
            held = held @ parts
        return held[:, 0] / neighbours.sum(-1)

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        check_before_llm(self, schedule)
