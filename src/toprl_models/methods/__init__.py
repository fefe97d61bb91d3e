"""Pruning methods of other papers, and controls, one file each, on the Policy protocol."""

from toprl_models.methods.divprune import DivPrune
from toprl_models.methods.downsample import Downsample
from toprl_models.methods.fastervlm import FasterVLM
from toprl_models.methods.fastv import FastV
from toprl_models.methods.fastv_progressive import FastVProgressive
from toprl_models.methods.oneshot import OneShot
from toprl_models.methods.pyramiddrop import PyramidDrop
from toprl_models.methods.random import RandomPolicy
from toprl_models.methods.sparsevlm import SparseVLM
from toprl_models.methods.visionzip import VisionZip

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
