"""Adapters that prune visual tokens inside transformers models."""

from toprl_models.families import Family, register_family
from toprl_models.methods import (
    Compose,
    DivPrune,
    Downsample,
    FasterVLM,
    FastV,
    FastVProgressive,
    OneShot,
    PyramidDrop,
    RandomPolicy,
    SparseVLM,
    TopRLPolicy,
    VisionZip,
)
from toprl_models.policy import Decision, Policy, PromptEmbeddings, StageContext
from toprl_models.pruner import Pruner, attach
from toprl_models.registry import METHODS, Method, method_of, register_method, schedule_for
from toprl_models.runtime.state import StageTrace
from toprl_models.schedule import Schedule

__all__ = [
    "METHODS",
    "Compose",
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
    "method_of",
    "register_family",
    "register_method",
    "schedule_for",
]
