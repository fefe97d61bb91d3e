"""The differentiable objective: the answer's cross entropy reaches the actor through the frozen model.

The paper's mask is sampled hard and differentiated as the relaxed sample at temperature tau. It enters the model in
mode "mask", where ``masked_attention`` (Eqs. 6-7) hands its gradient on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toprl_models import Decision, Schedule, StageContext, TopRLPolicy, attach
from training.rewards import retention_term
from training.rollout import SamplingPolicy
from training.tasks import Sample
from training.trainer.teacher_forcing import answer_log_prob


class RelaxedPolicy(SamplingPolicy):
    """Samples the masks of the same episodes as ``SamplingPolicy``, with the gradient of the relaxed samples.

    Attributes:
        retained: after each stage, the mean of its mask over a sample's original tokens, ``[B]``: L_t / L.
        num_visual: the original tokens L, ``[B]``.
    """

    # the exact derivative at a dropped token that would have dominated drowns all others: 1e9 in the embedded model
    bounded_mask_grad = True

    def __init__(self, policy: TopRLPolicy, seed: int, episodes: Tensor, tau: float) -> None:
        super().__init__(policy, seed, episodes, tau)
        self.retained: list[Tensor] = []
        self.keep_mask: Tensor | None = None

    def decide(self, context: StageContext) -> Decision:
        logits, sample = self.sample(context)
        # m_t = m_{t-1} * sample: the slots are the same at every stage in mode "mask"
        self.keep_mask = sample.keep_mask if self.keep_mask is None else self.keep_mask * sample.keep_mask
        self.num_visual = torch.tensor(context.num_visual, device=logits.device)
        self.retained.append(self.keep_mask.sum(1) / self.num_visual.clamp(min=1))
        return Decision((logits[..., 0] - logits[..., 1]).detach(), self.keep_mask)


@dataclass
class StraightThrough:
    """Loss of the episodes of an iteration: -log p(answer) + ``retention_coef`` * sum over t of alpha_t L_t / L.

    log p is the mean over the tokens of the reference answer and the end token; a budget replaces L_t / L as in the
    reward (``retention_term``).

    Attributes:
        samples: of this process's episodes.
        inputs: what the model is called with for some of these, by their numbers.
        episodes: int64 ``[B]``, the numbers of these episodes; with ``seed`` all that their noise depends on.
        alpha: ``[T]``, the weights of Eq. 5.
    """

    model: Any
    processor: Any
    policy: TopRLPolicy
    schedule: Schedule
    samples: Sequence[Sample]
    inputs: Callable[[list[int]], dict[str, Any]]
    episodes: Tensor
    seed: int
    tau: float
    alpha: Tensor
    retention_coef: float
    budget: float

    def __call__(self, rows: Tensor, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the episodes ``rows`` divided by ``size``, and its two parts."""
        chosen = rows.tolist()
        relaxed = RelaxedPolicy(self.policy, self.seed, self.episodes[rows], self.tau)
        with attach(self.model, relaxed, schedule=self.schedule, mode="mask") as pruner:
            samples = [self.samples[i] for i in chosen]
            log_prob = answer_log_prob(self.model, self.processor, samples, self.inputs(chosen), pruner)
        answer_loss = -log_prob.sum() / size
        retained = torch.stack(relaxed.retained, 1)  # [B, T]
        num_layers = self.model.config.get_text_config().num_hidden_layers
        term = retention_term(retained, relaxed.num_visual, self.schedule.layers, num_layers, self.budget)
        retention = (term @ self.alpha.to(term)).sum() / size
        loss = answer_loss + self.retention_coef * retention
        return loss, {"answer_loss": answer_loss, "relaxed_retention": retention}
