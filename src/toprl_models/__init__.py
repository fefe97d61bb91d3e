"""Adapters that prune visual tokens inside transformers models."""

from toprl_models.baselines import FastV, PyramidDrop, RandomPolicy
from toprl_models.families import Family, register_family
from toprl_models.policy import Decision, Policy, StageContext, TopRLPolicy
from toprl_models.pruner import Pruner, attach
from toprl_models.schedule import Schedule
from toprl_models.stages import StageTrace

__all__ = [
    "Decision",
    "Family",
    "FastV",
    "Policy",
    "Pruner",
    "PyramidDrop",
    "RandomPolicy",
    "Schedule",
    "StageContext",
    "StageTrace",
    "TopRLPolicy",
    "attach",
    "register_family",
]
