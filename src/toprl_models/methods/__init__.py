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
from toprl_models.methods.cdpruner import CDPruner
from toprl_models.methods.vispruner import VisPruner
from toprl_models.methods.holov import HoloV
from toprl_models.methods.prumerge_plus import PruMergePlus
from toprl_models.methods.hiprune import HiPrune
from toprl_models.methods.gprune import GPrune
from toprl_models.methods.vscan import VScan
from toprl_models.methods.tome import ToMe
from toprl_models.methods.dart import DART
from toprl_models.methods.fitprune import FitPrune
from toprl_models.methods.evs import EVS
from toprl_models.methods.vidcom2 import VidCom2
from toprl_models.methods.dycoke import DyCoke
from toprl_models.methods.fastvid import FastVID
from toprl_models.methods.downsample import Downsample
from toprl_models.methods.oneshot import OneShot
from toprl_models.methods.random import RandomPolicy
from toprl_models.methods.compose import Compose
# isort: on

__all__ = [
    "DART",
    "EVS",
    "CDPruner",
    "Compose",
    "DivPrune",
    "Downsample",
    "DyCoke",
    "FastV",
    "FastVID",
    "FastVProgressive",
    "FasterVLM",
    "FitPrune",
    "GPrune",
    "HiPrune",
    "HoloV",
    "OneShot",
    "PruMergePlus",
    "PyramidDrop",
    "RandomPolicy",
    "SparseVLM",
    "ToMe",
    "TopRLPolicy",
    "VScan",
    "VidCom2",
    "VisPruner",
    "VisionZip",
]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    if not _module.name.rpartition(".")[2].startswith("_"):
        importlib.import_module(_module.name)


class _Package(ModuleType):
    def __call__(self, *args: object, **kwargs: object) -> None:
        raise TypeError("toprl_models.methods is a package now; the methods by name are the dict toprl_models.METHODS")


sys.modules[__name__].__class__ = _Package
