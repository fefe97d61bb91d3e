"""FastV (Chen et al., ECCV 2024, "An image is worth 1/2 tokens after layer 2")."""

from __future__ import annotations

from torch import Tensor

from toprl_models.policy import Policy, StageContext
from toprl_models.registry import register_method


@register_method("fastv", "FastV", "Chen et al., ECCV 2024", stages=(2,))
class FastV(Policy):
    """Keep the tokens that the last prompt token attended to most in the layer before the stage.

    Score: attention of layer ``layer - 1``, softmax over all causal keys, mean over heads, last query row, visual
    slice. It is computed from that row's query and the keys only, so any attention backend stays usable and the cache
    is not touched. The authors prune once, before layer 2 (K=2, R=.5), and keep original positions: one stage. With
    several stages it is the paper's progressive variant, FastV-P.
    """

    attention_from = "previous"

    def score(self, context: StageContext) -> Tensor:
        return context.last_attention()
