"""PyramidDrop (Xing et al., CVPR 2025)."""

from __future__ import annotations

from torch import Tensor

from toprl_models.policy import Policy, StageContext


class PyramidDrop(Policy):
    """Keep the tokens whose keys match the last prompt token's query best, stage by stage.

    Before layer ``layer``: its input norm, query and key projections and rotary embedding are applied to the states
    that are about to enter it (the authors' ``rank_layer``); float32 softmax over the whole sequence, head mean, visual
    slice. The authors' defaults keep .5/.25/.125 of the original tokens before layers 8/16/24 (0-based) of 32.

    Deviation: the authors renumber the positions of the surviving tokens after each stage; here they keep their
    original positions, as with every other method.
    """

    attention_from = "current"

    def score(self, context: StageContext) -> Tensor:
        return context.last_attention()
