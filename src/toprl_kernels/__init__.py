"""Operators for visual token pruning: Triton kernels with plain PyTorch twins. Imports without triton or a GPU."""

from toprl_kernels import flops
from toprl_kernels.actor.api import actor_score
from toprl_kernels.actor.reference import ActorWeights, FoldedActorWeights, fold_actor_weights
from toprl_kernels.attention.api import AttentionPlan, attention_plan, masked_attention
from toprl_kernels.cache.api import compact_cache
from toprl_kernels.dispatch import explain
from toprl_kernels.keep_mask.api import KeepMaskSample, keep_mask_log_prob, sample_keep_mask
from toprl_kernels.stage.api import prune_stage
from toprl_kernels.stage.reference import PruneStageOutput
from toprl_kernels.topk.api import topk_compact
from toprl_kernels.topk.reference import TopkCompactOutput

__all__ = [
    "ActorWeights",
    "AttentionPlan",
    "FoldedActorWeights",
    "KeepMaskSample",
    "PruneStageOutput",
    "TopkCompactOutput",
    "actor_score",
    "attention_plan",
    "compact_cache",
    "explain",
    "flops",
    "fold_actor_weights",
    "keep_mask_log_prob",
    "masked_attention",
    "prune_stage",
    "sample_keep_mask",
    "topk_compact",
]
