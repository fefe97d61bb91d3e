"""Episodes: the frozen model answers while the actor samples keep masks; states and actions are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toprl_kernels import KeepMaskSample, sample_keep_mask
from toprl_models import Decision, Policy, Schedule, StageContext, TopRLPolicy, attach
from training.tasks import Sample, Task, answer

MAX_VISUAL = 2**24  # more visual tokens than any sample has: room for the numbers of one stage's tokens


@dataclass
class Step:
    """One stage of a batch of episodes: state s_t, action m_t and what the policy said of it.

    Shapes: hidden_states ``[B, V, D]`` and text_state ``[B, D]``, as ``TopRLPolicy.inputs`` gives them (the question
    is in them where the policy sees it); valid_mask, keep_mask (bool) and log_prob ``[B, V]``; kept_fraction ``[B]``
    (surviving share before the action) and value ``[B]``.
    """

    hidden_states: Tensor
    valid_mask: Tensor
    keep_mask: Tensor
    log_prob: Tensor
    text_state: Tensor
    kept_fraction: Tensor
    value: Tensor


@dataclass
class Rollout:
    """A batch of episodes.

    ``steps[t]`` for each stage; quality Q_p ``[B]``, retained L_t / L ``[B, T]``, num_visual L ``[B]`` on the host;
    log_prob ``[B]``, of the reference answer under these masks, where it was asked for.
    """

    steps: list[Step]
    quality: Tensor
    retained: Tensor
    num_visual: Tensor
    answers: list[str]
    log_prob: Tensor | None = None


class SamplingPolicy(Policy):
    """Samples the actor's masks instead of taking its top-k, and records the episode.

    The noise of a token is a function of the seed, the episode's number, the stage and the token's place among the
    sample's original tokens: it does not depend on what else is in the batch, on the device, or on whether earlier
    stages removed or masked what they dropped.
    """

    def __init__(self, policy: TopRLPolicy, seed: int, episodes: Tensor, tau: float) -> None:
        self.policy, self.seed, self.episodes, self.tau = policy, seed, episodes, tau
        self.attention_from, self.uses_text = policy.attention_from, policy.uses_text
        self.steps: list[Step] = []

    def check(self, model: Any, schedule: Schedule) -> None:
        self.policy.check(model, schedule)

    def sample(self, context: StageContext, hidden_states: Tensor | None = None) -> tuple[Tensor, KeepMaskSample]:
        """The actor's logits ``[B, V, 2]`` and the masks drawn from them; ``hidden_states``: what the actor reads."""
        if hidden_states is None:
            hidden_states = self.policy.inputs(context)[0]
        logits = self.policy.logits(hidden_states, context.stage, context.valid_mask)
        first = (self.episodes.to(logits.device) * len(self.policy.stage_layers) + context.stage) * MAX_VISUAL
        token_ids = first[:, None] + context.visual_index.clamp(min=0)
        return logits, sample_keep_mask(
            logits, seed=self.seed, token_ids=token_ids, tau=self.tau, previous_mask=context.valid_mask
        )

    @torch.no_grad()
    def decide(self, context: StageContext) -> Decision:
        hidden_states, text_state = self.policy.inputs(context)
        logits, sample = self.sample(context, hidden_states)
        original = torch.tensor(context.num_visual, device=hidden_states.device)
        kept_fraction = context.valid_mask.sum(1) / original.clamp(min=1)
        keep_mask = sample.keep_mask.bool()
        value = self.policy.value(hidden_states, context.stage, context.valid_mask, text_state, kept_fraction)
        self.steps.append(
            Step(hidden_states, context.valid_mask, keep_mask, sample.log_prob, text_state, kept_fraction, value)
        )
        return Decision(logits[..., 0] - logits[..., 1], keep_mask)


class ArgmaxPolicy(Policy):
    """Keeps what the actor finds more likely kept than dropped: as many tokens as it wants, without sampling."""

    def __init__(self, policy: TopRLPolicy) -> None:
        self.policy = policy
        self.attention_from, self.uses_text = policy.attention_from, policy.uses_text

    def check(self, model: Any, schedule: Schedule) -> None:
        self.policy.check(model, schedule)

    @torch.no_grad()
    def decide(self, context: StageContext) -> Decision:
        scores = self.policy.score(context)
        return Decision(scores, scores > 0)


def rollout(
    model: Any,
    processor: Any,
    policy: TopRLPolicy,
    schedule: Schedule,
    task: Task,
    samples: Sequence[Sample],
    inputs: dict[str, Any],
    *,
    episodes: Tensor,
    seed: int,
    tau: float,
    mode: str,
) -> Rollout:
    """Let the model answer ``samples`` under sampled masks (Eq. 3 is the model's own forward pass).

    Args:
        inputs: of the model for ``samples``, on its device (``encode``).
        episodes: int64 ``[B]``, a number for each episode, all different in a training run; with ``seed`` they are
            all that the sampled masks depend on besides the actor.
        mode: "compact" really drops tokens, "mask" uses Eqs. 6-7. Surviving tokens see the same numbers.
    """
    sampling = SamplingPolicy(policy, seed, episodes, tau)
    with attach(model, sampling, schedule=schedule, mode=mode) as pruner:  # type: ignore[arg-type]
        answers, quality = answer(model, processor, task, samples, inputs)
        counts = torch.tensor([stage.counts for stage in pruner.trace], dtype=torch.float32).T
        num_visual = torch.tensor(pruner.trace[0].num_visual)
    return Rollout(sampling.steps, quality, counts / num_visual[:, None], num_visual, answers)
