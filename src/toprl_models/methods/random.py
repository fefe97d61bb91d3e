"""Random pruning: the control that any method has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_models.policy import Policy, StageContext
from toprl_models.registry import register_method


@register_method("random", "Random patches", "control", staged=True)
class RandomPolicy(Policy):
    """Keep tokens uniformly at random.

    Args:
        seed: seed of the scores. They are drawn on the CPU, call after call, so a run is reproducible on any device,
            and one for each original token, so that both modes of the pruner keep the same.
    """

    uses_text = False

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def score(self, context: StageContext) -> Tensor:
        drawn = torch.rand(len(context.num_visual), max(context.num_visual), generator=self.generator)
        return context.of_original(drawn.to(context.hidden_states.device))
