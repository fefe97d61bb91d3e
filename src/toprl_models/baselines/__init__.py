"""Pruning methods of other papers, and controls, one file each, on the Policy protocol."""

from toprl_models.baselines.divprune import DivPrune
from toprl_models.baselines.downsample import Downsample
from toprl_models.baselines.fastervlm import FasterVLM
from toprl_models.baselines.fastv import FastV
from toprl_models.baselines.fastv_progressive import FastVProgressive
from toprl_models.baselines.oneshot import OneShot
from toprl_models.baselines.pyramiddrop import PyramidDrop
from toprl_models.baselines.random import RandomPolicy
from toprl_models.baselines.sparsevlm import SparseVLM
from toprl_models.baselines.visionzip import VisionZip

__all__ = [
    "DivPrune",
    "Downsample",
    "FastV",
    "FastVProgressive",
    "FasterVLM",
    "OneShot",
    "PyramidDrop",
    "RandomPolicy",
    "SparseVLM",
    "VisionZip",
]
