"""A rollout as the update reads it: the surviving tokens of all stages one after the other, without padding.

The actor is the same at every stage but for a bias, and LayerNorm's statistics do not depend on the weights. So the
states are normalised once per rollout, and one matrix product is fc1 of all tokens of a minibatch at all stages.
``TopRLPolicy.logits`` and ``TopRLPolicy.value`` are the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toprl_kernels import keep_mask_log_prob
from toprl_models import TopRLPolicy
from training.rollout import Step


class _Spread(torch.autograd.Function):
    """Row s of ``values`` [S, d] for each token of segment s: [n, d].

    The gradient is the sum over each segment; PyTorch's own backward adds atomically on CUDA, in any order.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, lengths: Tensor, segment: Tensor) -> Tensor:
        ctx.save_for_backward(lengths)
        return values.index_select(0, segment)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return segment_sum(gradient, *ctx.saved_tensors), None, None


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum of the first ``lengths[0]`` rows of ``values`` [n, ...], of the next ``lengths[1]``, and so on: [S, ...]."""
    return torch.segment_reduce(values.contiguous(), "sum", lengths=lengths, axis=0, unsafe=True)


@dataclass
class Tokens:
    """The surviving tokens of r episodes at T stages: n tokens in S = T * r segments, stage by stage.

    Shapes: ``features`` ``[n, d + T]`` (LayerNorm(h) without its weight and bias, then the stage as one-hot),
    ``keep_mask`` (bool) and ``log_prob`` ``[n]`` as recorded; ``lengths`` ``[S]`` tokens of each segment, ``segment``
    ``[n]`` the segment of each token; ``pooled`` ``[S, 2, d]`` (mean over the tokens and text state, normalised
    likewise), ``known`` ``[S, 1 + T]`` (kept fraction and stage) and ``value`` ``[S]`` as recorded.
    """

    features: Tensor
    keep_mask: Tensor
    log_prob: Tensor
    lengths: Tensor
    segment: Tensor
    pooled: Tensor
    known: Tensor
    value: Tensor

    def evaluate(self, policy: TopRLPolicy) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy ``[n]`` of the recorded actions under the present actor."""
        half = policy.fc1.out_features // 2
        stage_bias = policy.stage_bias + policy.fc1.bias + policy.fc1.weight @ policy.norm.bias
        z = F.gelu(F.linear(self.features, torch.cat([policy.fc1.weight * policy.norm.weight, stage_bias.T], 1)))
        mean = segment_sum(z[:, half:], self.lengths) / self.lengths.clamp(min=1)[:, None]
        local, summary = policy.fc2.weight.split(half, 1)
        spread = _Spread.apply(F.linear(mean, summary, policy.fc2.bias), self.lengths, self.segment)
        z = F.gelu(F.linear(z[:, :half], local) + spread)
        logits = policy.head(F.gelu(policy.fc3(z)))
        log_prob, entropy = keep_mask_log_prob(logits[None], self.keep_mask[None])
        return log_prob[0], entropy[0]

    def values(self, policy: TopRLPolicy) -> Tensor:
        """The critic's estimates ``[S]``."""
        pooled = self.pooled * policy.critic_norm.weight + policy.critic_norm.bias
        return policy.critic(torch.cat([pooled.flatten(1), self.known], 1)).squeeze(-1)


class PackedRollout:
    """The steps of a rollout of B episodes, packed once; ``select`` gives the tokens of some of them.

    Attributes:
        counts: int64 ``[T, B]`` on the host, surviving tokens of each episode before each stage acts.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.counts = torch.stack([step.valid_mask.sum(1) for step in steps]).cpu()
        self._ends = self.counts.flatten().cumsum(0).view_as(self.counts)
        shape, width = steps[0].hidden_states.shape[-1:], steps[0].hidden_states.shape[-1]
        stages = torch.eye(len(steps), device=steps[0].value.device)
        self.features = steps[0].hidden_states.new_empty(int(self.counts.sum()), width + len(steps))
        pooled, known, parts = [], [], self.features.split(self.counts.sum(1).tolist())
        for step, stage, part in zip(steps, stages, parts, strict=True):
            states, weight = step.hidden_states, step.valid_mask.to(step.hidden_states.dtype)[..., None]
            part[:, :width], part[:, width:] = F.layer_norm(states[step.valid_mask], shape), stage
            mean = (states * weight).sum(1) / weight.sum(1).clamp(min=1)
            pooled.append(F.layer_norm(torch.stack([mean, step.text_state], 1), shape))
            known.append(torch.cat([step.kept_fraction[:, None].to(mean), stage.expand(len(mean), -1)], 1))
        self.keep_mask = torch.cat([step.keep_mask[step.valid_mask] for step in steps])
        self.log_prob = torch.cat([step.log_prob[step.valid_mask] for step in steps])
        self.pooled, self.known = torch.stack(pooled), torch.stack(known)
        self.value = torch.stack([step.value for step in steps])

    def select(self, rows: Tensor) -> Tokens:
        """The tokens of the episodes ``rows`` (int64 on the host), without waiting for the device."""
        lengths = self.counts[:, rows].flatten()
        segment = torch.arange(len(lengths)).repeat_interleave(lengths)
        # a token's place in the rollout is its place here, moved by the distance of the segment's two ends
        index = torch.arange(len(segment)) + (self._ends[:, rows].flatten() - lengths.cumsum(0))[segment]
        device = self.features.device
        lengths, segment, index, rows = (x.to(device, non_blocking=True) for x in (lengths, segment, index, rows))
        return Tokens(
            features=self.features.index_select(0, index),
            keep_mask=self.keep_mask.index_select(0, index),
            log_prob=self.log_prob.index_select(0, index),
            lengths=lengths,
            segment=segment,
            pooled=self.pooled.index_select(1, rows).flatten(0, 1),
            known=self.known.index_select(1, rows).flatten(0, 1),
            value=self.value.index_select(1, rows).flatten(),
        )
