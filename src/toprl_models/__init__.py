"""Adapters that prune visual tokens inside transformers models."""

from toprl_models.baselines import (
    DivPrune,
    Downsample,
    FasterVLM,
    FastV,
    FastVProgressive,
    OneShot,
    PyramidDrop,
    RandomPolicy,
    SparseVLM,
    VisionZip,
)
from toprl_models.families import Family, register_family
from toprl_models.methods import Method, methods, schedule_for
from toprl_models.policy import Decision, Policy, PromptEmbeddings, StageContext, TopRLPolicy
from toprl_models.pruner import Pruner, attach
from toprl_models.schedule import Schedule
from toprl_models.stages import StageTrace

__all__ = [
    "Decision",
    "DivPrune",
    "Downsample",
    "Family",
    "FastV",
    "FastVProgressive",
    "FasterVLM",
    "Method",
    "OneShot",
    "Policy",
    "PromptEmbeddings",
    "Pruner",
    "PyramidDrop",
    "RandomPolicy",
    "Schedule",
    "SparseVLM",
    "StageContext",
    "StageTrace",
    "TopRLPolicy",
    "VisionZip",
    "attach",
    "methods",
    "register_family",
    "schedule_for",
]
