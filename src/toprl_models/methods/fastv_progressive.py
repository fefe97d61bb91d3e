"""FastV-P: FastV at several stages, the variant that TOP-RL's paper compares with."""

from __future__ import annotations

from toprl_models.methods.fastv import FastV
from toprl_models.registry import register_method


@register_method("fastv_progressive", "FastV-P", "TOP-RL, Fig. 2", stages=(8, 16, 24), staged=True)
class FastVProgressive(FastV):
    """FastV's score (Chen et al., ECCV 2024) at each of several stages.

    FastV's authors prune once. TOP-RL's paper prunes before layers 8, 16 and 24 (0-based) of 32 and drops .5, .75 and
    .875 of the original tokens in total: ``Schedule(((8, 0.5), (16, 0.25), (24, 0.125)))``. There is no public code
    for it. Later stages score what earlier ones left, by the attention of the layer before the stage among the
    survivors; positions stay, as in FastV.
    """
