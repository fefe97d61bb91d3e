"""Pruning methods of other papers, one file each, on the Policy protocol."""

from toprl_models.baselines.fastv import FastV
from toprl_models.baselines.pyramiddrop import PyramidDrop
from toprl_models.baselines.random import RandomPolicy

__all__ = ["FastV", "PyramidDrop", "RandomPolicy"]
