"""One-shot pruning: any policy's decision, taken once. The control that shows what progressive pruning gains."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from toprl_models.methods.toprl import TopRLPolicy
from toprl_models.policy import Decision, Policy, StageContext
from toprl_models.registry import register_method
from toprl_models.schedule import Schedule

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


@register_method(
    "oneshot",
    "TOP-RL, one stage",
    "TOP-RL, appendix C",
    stages=(2,),
    from_trained=lambda policy, layers: OneShot(policy, layers[0]),
)
class OneShot(Policy):
    """Prune once, before ``layer``, by the scores of ``policy`` (TOP-RL, appendix C: progressive against one-shot).

    For an equal budget choose a schedule with the same ``average_tokens``. Attention, positions, counts and hooks are
    those of ``policy``.

    Deviation: the paper does not say which stage of a learned policy it takes; ``stage`` says so here.

    Args:
        policy: whose decision is taken.
        layer: the decoder layer before which to prune; the schedule must have this stage and no other.
        stage: the stage that ``policy`` is told, by default the last of a ``TopRLPolicy``, which takes the bias of that
            stage. Policies that are not learned are told 0.

    Raises:
        ValueError: ``layer`` is negative, or ``stage`` is none of the policy's.

    Example:
        >>> attach(model, OneShot(policy, layer=8), schedule=Schedule(((8, 64),)))
    """

    def __init__(self, policy: Policy, layer: int, stage: int | None = None) -> None:
        if layer < 0:
            raise ValueError(f"layer={layer} must not be negative")
        num_stages = len(policy.stage_layers) if isinstance(policy, TopRLPolicy) else 1
        if stage is None:
            stage = num_stages - 1
        if not 0 <= stage < num_stages:
            raise ValueError(f"stage={stage} must be one of the policy's {num_stages} stages, 0..{num_stages - 1}")
        self.policy, self.layer, self.stage = policy, layer, stage
        self.attention_from, self.positions = policy.attention_from, policy.positions
        self.uses_text, self.bounded_mask_grad = policy.uses_text, policy.bounded_mask_grad

    def score(self, context: StageContext) -> Tensor:
        return self.policy.score(replace(context, stage=self.stage))

    def decide(self, context: StageContext) -> Decision:
        return self.policy.decide(replace(context, stage=self.stage))

    def counts(self, schedule: Schedule, num_visual: int) -> tuple[int, ...]:
        return self.policy.counts(schedule, num_visual)

    def hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        return self.policy.hooks(model)

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        if schedule.layers != (self.layer,):
            raise ValueError(
                f"schedule: stages before layers {schedule.layers}, but OneShot(layer={self.layer}) prunes once: "
                f"Schedule((({self.layer}, keep),))"
            )
        if isinstance(self.policy, TopRLPolicy):  # everything but the stages must fit what it was trained for
            schedule = Schedule(tuple((layer, 1.0) for layer in self.policy.stage_layers))
        self.policy.check(model, schedule)
