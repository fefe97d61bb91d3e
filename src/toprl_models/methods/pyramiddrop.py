"""PyramidDrop (Xing et al., CVPR 2025)."""

from __future__ import annotations

from torch import Tensor

from toprl_models.policy import Policy, StageContext
from toprl_models.registry import register_method


@register_method("pyramiddrop", "PyramidDrop", "Xing et al., CVPR 2025", staged=True)
class PyramidDrop(Policy):
    """Keep the tokens whose keys match the last prompt token's query best, stage by stage.

    Before layer ``layer``: its input norm, query and key projections and rotary embedding are applied to the states
    that are about to enter it (the authors' ``rank_layer``); float32 softmax over the whole sequence, head mean, visual
    slice. The authors' defaults keep .5/.25/.125 of the original tokens before layers 8/16/24 (0-based) of 32; for
    budgets below 144 of 576 tokens, r, r^2, r^3 before layers 2/8/16.

    Args:
        positions: "renumbered" as the authors do it, or "original", which mode "mask" needs.

    Deviation: the authors truncate the number of kept tokens, here it is rounded half up.
    """

    attention_from = "current"

    def __init__(self, positions: str = "renumbered") -> None:
        self.positions = positions

    def score(self, context: StageContext) -> Tensor:
        return context.last_attention()
