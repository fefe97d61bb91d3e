"""Adapters that prune visual tokens inside transformers models."""

from toprl_models.families import Family, register_family
from toprl_models.methods import (
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
from toprl_models.methods.toprl import TopRLPolicy
from toprl_models.policy import Decision, Policy, PromptEmbeddings, StageContext
from toprl_models.pruner import Pruner, attach
from toprl_models.registry import METHODS, Method, schedule_for
from toprl_models.runtime.state import StageTrace
from toprl_models.schedule import Schedule

__all__ = [
    "METHODS",
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
    "register_family",
    "schedule_for",
]
