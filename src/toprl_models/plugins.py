"""Methods from outside of this package: a class in a file, and the entry points of installed packages.

[project.entry-points."toprl.methods"]     # in pyproject.toml of a package that brings the method "brightest"
brightest = "my_package.brightest:Brightest"
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TypeGuard

from toprl_models.policy import Policy
from toprl_models.registry import METHODS, Method, register_method

GROUP = "toprl.methods"


def names() -> list[str]:
    """Name the methods of installed packages that are not loaded yet."""
    return [entry.name for entry in metadata.entry_points(group=GROUP) if entry.name not in METHODS]


def load(name: str) -> bool:
    """Register the method ``name`` of an installed package; False where no package has it.

    Raises:
        ImportError: the package fails to import, or brings no such method; the message names it.
    """
    for entry in metadata.entry_points(group=GROUP, name=name):
        package = entry.dist.name if entry.dist else entry.module
        try:
            loaded = entry.load()
        except Exception as error:
            raise ImportError(
                f"method {name!r}: package {package} brings it as {entry.value}, which cannot be imported "
                f"({type(error).__name__}: {error}); repair or uninstall {package}"
            ) from error
        if name not in METHODS and _is_policy(loaded):
            register_method(name, staged=True)(loaded)
        if name not in METHODS:
            raise ImportError(
                f"method {name!r}: {entry.value} of package {package} is neither a toprl_models.Policy class nor a "
                "module that registers this name with register_method"
            )
        return True
    return False


def method_in_file(name: str) -> Method:
    """Return the method "path:Class": as its file registers it, or else at any stages, by default the paper's.

    Raises:
        ValueError: no such file or class, or not a ``Policy``.
        ImportError: the file cannot be imported.
    """
    text, _, class_name = name.rpartition(":")
    path = Path(text).expanduser().resolve()
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"method {name!r}: there is no Python file {path}; give path:Class, as in my_file.py:MyMethod")
    module = _module(path, path.stat().st_mtime_ns)
    policy = getattr(module, class_name, None)
    if not _is_policy(policy):
        inside = [
            key for key, value in vars(module).items() if _is_policy(value) and value.__module__ == module.__name__
        ]
        what = "has no" if policy is None else "defines as something else than a toprl_models.Policy the name"
        raise ValueError(f"method {name!r}: {path} {what} {class_name}; policies in it: {', '.join(inside) or 'none'}")
    for method in METHODS.values():
        if method.policy is policy:
            return replace(method, name=name)
    return Method(name, class_name, "", policy, staged=True)


def files_of(name: str) -> list[Path]:
    """List the files that hold the classes in a method's name."""
    return [Path(part.strip().rpartition(":")[0]).expanduser() for part in name.split("+") if ":" in part]


def _is_policy(value: object) -> TypeGuard[type[Policy]]:
    return inspect.isclass(value) and issubclass(value, Policy)


@functools.cache
def _module(path: Path, changed: int) -> ModuleType:
    """Import ``path``; ``changed`` is the file's time, so that an edited file is imported again."""
    spec = importlib.util.spec_from_file_location(f"toprl_method_{path.stem}_{abs(hash(path)):x}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise ImportError(f"{path} cannot be imported ({type(error).__name__}: {error})") from error
    return module
