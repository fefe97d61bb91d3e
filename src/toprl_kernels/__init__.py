"""Operators for visual token pruning: Triton kernels with plain PyTorch twins. Imports without triton or a GPU."""

from toprl_kernels import flops
from toprl_kernels.actor.api import actor_score
from toprl_kernels.actor.weights import ActorWeights
from toprl_kernels.attention.api import AttentionPlan, attention_plan, masked_attention
from toprl_kernels.cache.api import compact_cache
from toprl_kernels.dispatch import explain
from toprl_kernels.keep_mask.api import KeepMaskSample, keep_mask_log_prob, sample_keep_mask
from toprl_kernels.topk.api import topk_compact
from toprl_kernels.topk.output import TopkCompactOutput

__all__ = [
    "ActorWeights",
    "AttentionPlan",
    "KeepMaskSample",
    "TopkCompactOutput",
    "actor_score",
    "attention_plan",
    "compact_cache",
    "explain",
    "flops",
    "keep_mask_log_prob",
    "masked_attention",
    "sample_keep_mask",
    "topk_compact",
]
