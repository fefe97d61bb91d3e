"""The oldest supported release of transformers is named twice: for pip, and for the run of the tests with it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import transformers
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


def required() -> Requirement:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return next(one for one in map(Requirement, extras["models"]) if one.name == "transformers")


def test_the_oldest_release_that_is_tested_is_the_floor():
    pinned = re.search(r"^transformers==(.+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    floor = [one.version for one in required().specifier if one.operator == ">="]
    assert [Version(one) for one in floor] == [Version(pinned[1])]


def test_the_installed_release_is_a_supported_one():
    assert required().specifier.contains(transformers.__version__)
