"""FitPrune (Ye et al., AAAI 2025, "Fit and Prune: Fast and Training-free Visual Token Pruning ...")."""

from __future__ import annotations

from torch import Tensor

from toprl_models.policy import Policy, StageContext
from toprl_models.registry import register_method


@register_method("fitprune", "FitPrune", "Ye et al., AAAI 2025", staged=True)
class FitPrune(Policy):
    """Keep the tokens that question and picture attend to most, stage by stage.

    Score: the attention that a token receives from the question tokens times what it receives from the visual tokens,
    in the layer before the stage: of each pair of tokens the largest over heads, then the sum over those that attend.
    Positions stay.

    Deviation: the authors prune inside many layers, behind their attention, by numbers of tokens that they fitted to
    attention distributions of a data set (0 to 262 tokens a layer). Here the schedule gives the numbers, and dropped
    tokens pass through the rest of the layer before the stage, which no other token sees.
    """

    attention_from = "previous"

    def score(self, context: StageContext) -> Tensor:
        of_question, of_picture = context.peak_attention()
        return of_question * of_picture
