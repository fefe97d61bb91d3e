"""A tiny random model and prompts for every image-text-to-text class of transformers.

Every module of this package holds classes of one kinship in a dict ``ZOO``, by class name; this package merges them.
"""

from __future__ import annotations

import importlib
import pkgutil

from tests.models.tiny_families import TinyFamily

ZOO: dict[str, TinyFamily] = {}
for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    _families = importlib.import_module(f"{__name__}.{_module}").ZOO
    if _twice := ZOO.keys() & _families.keys():
        raise ValueError(f"{_module}.ZOO: {sorted(_twice)} stand in another module too; keep one of them")
    ZOO |= _families
