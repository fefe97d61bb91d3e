"""Composition: another method at each stage of one schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from toprl_models.methods.oneshot import OneShot
from toprl_models.methods.toprl import TopRLPolicy
from toprl_models.policy import Decision, Policy, StageContext
from toprl_models.schedule import Schedule

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


class Compose(Policy):
    """Prune by another policy at each stage: the first policy decides at the first stage, and so on.

    Attention, positions and mask gradient at a stage are those of its policy. A ``TopRLPolicy`` is told the stage that
    it was trained for at this layer, or its last where it was trained for other layers (as ``OneShot`` does); other
    policies are told that they decide at stage 0. By name: ``method_of("divprune+fastv")``.

    Args:
        policies: one for each stage of the schedule.

    Raises:
        ValueError: no policies; by ``attach``, another number of stages, or a policy that does not fit its stage.
        TypeError: an item that is no Policy, or a Compose.

    Example:
        >>> policy = Compose([DivPrune(), FastV(), TopRLPolicy.from_pretrained(folder)])
        >>> attach(model, policy, schedule=Schedule(((0, 0.5), (2, 0.25), (8, 0.1))))
    """

    def __init__(self, policies: Sequence[Policy]) -> None:
        if not policies:
            raise ValueError("policies is empty; give one policy for each stage")
        for policy in policies:
            if isinstance(policy, Compose):
                raise TypeError("policies: a Compose within a Compose; list its policies instead, one for each stage")
            if not isinstance(policy, Policy):
                raise TypeError(f"policies: {type(policy).__name__} is not a toprl_models.Policy")
        self.policies = tuple(policies)

    def at_stage(self, stage: int) -> Policy:
        policy = self.policies[stage]
        return type(type(policy).__name__, (_Part,), {})(policy)  # errors name the policy

    def decide(self, context: StageContext) -> Decision:
        return self.at_stage(context.stage).decide(context)

    def counts(self, schedule: Schedule, num_visual: int) -> tuple[int, ...]:
        """Count stage by stage: tokens that a policy merges reach the next policy, which keeps no more than is left."""
        counts, left = [], num_visual
        for policy, layer, wanted in zip(self.policies, schedule.layers, schedule.counts(num_visual), strict=True):
            (left,) = policy.counts(Schedule(((layer, min(wanted, left)),)), left)
            counts.append(left)
        return tuple(counts)

    def hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        return [handle for policy in dict.fromkeys(self.policies) for handle in policy.hooks(model)]

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        if len(schedule) != len(self.policies):
            raise ValueError(
                f"schedule: stages before layers {schedule.layers}, but Compose has {len(self.policies)} policies "
                f"({', '.join(type(policy).__name__ for policy in self.policies)}): give one stage for each"
            )
        for policy, (layer, keep) in zip(self.policies, schedule.stages, strict=True):
            if policy.attention_from == "previous" and not layer:
                raise ValueError(
                    f"schedule: a stage at layer 0, but {type(policy).__name__} reads the attention of the layer before"
                )
            alone = OneShot(policy, layer) if isinstance(policy, TopRLPolicy) else policy
            alone.check(model, replace(schedule, stages=((layer, keep),)))


class _Part(Policy):
    """A policy of a composition, which is told the stage it knows instead of the schedule's."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.attention_from, self.positions = policy.attention_from, policy.positions
        self.uses_text, self.bounded_mask_grad = policy.uses_text, policy.bounded_mask_grad

    def decide(self, context: StageContext) -> Decision:
        stage, policy = 0, self.policy
        if isinstance(policy, TopRLPolicy):
            layers = policy.stage_layers
            stage = layers.index(context.layer) if context.layer in layers else len(layers) - 1
        return policy.decide(replace(context, stage=stage))
