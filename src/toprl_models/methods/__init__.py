"""Pruning methods, one file each: a Policy class that ``register_method`` puts into ``toprl_models.METHODS``.

A new method is one file: each module of this folder is imported, those that begin with "_" are helpers.
"""

import importlib
import pkgutil
import sys
from types import ModuleType

# isort: off
# the order of tables
from toprl_models.methods.toprl import TopRLPolicy
from toprl_models.methods.fastv import FastV
from toprl_models.methods.fastv_progressive import FastVProgressive
from toprl_models.methods.pyramiddrop import PyramidDrop
from toprl_models.methods.sparsevlm import SparseVLM
from toprl_models.methods.visionzip import VisionZip
from toprl_models.methods.fastervlm import FasterVLM
from toprl_models.methods.divprune import DivPrune
from toprl_models.methods.downsample import Downsample
from toprl_models.methods.oneshot import OneShot
from toprl_models.methods.random import RandomPolicy
from toprl_models.methods.compose import Compose
# isort: on

__all__ = [
    "Compose",
    "DivPrune",
    "Downsample",
    "FastV",
    "FastVProgressive",
    "FasterVLM",
    "OneShot",
    "PyramidDrop",
    "RandomPolicy",
    "SparseVLM",
    "TopRLPolicy",
    "VisionZip",
]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    if not _module.name.rpartition(".")[2].startswith("_"):
        importlib.import_module(_module.name)


class _Package(ModuleType):
    def __call__(self, *args: object, **kwargs: object) -> None:
        raise TypeError("toprl_models.methods is a package now; the methods by name are the dict toprl_models.METHODS")


sys.modules[__name__].__class__ = _Package
