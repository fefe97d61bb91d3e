"""The registry of methods: registration, a class in a file, entry points of installed packages, names that moved."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import toprl_models
from tests.models.tiny_families import build_model
from toprl_models import METHODS, FastV, Policy, attach, method_of, methods, plugins, register_method, schedule_for
from toprl_models.families import FAMILIES

BRIGHTEST = """
from toprl_models import Policy, register_method
{decorator}
class Brightest(Policy):
    def score(self, context):
        return context.hidden_states.norm(dim=-1)
LIMIT = 3
"""


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows that a test adds go with it."""
    before = dict(METHODS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    METHODS.clear()
    METHODS.update(before)


def write(folder: Path, decorator: str = "", name: str = "my_file.py") -> Path:
    path = folder / name
    path.write_text(BRIGHTEST.format(decorator=decorator))
    return path


# --- registration ---


def test_each_file_of_methods_registers_itself() -> None:
    files = {path.stem for path in Path(methods.__file__).parent.glob("[!_]*.py")} - {"compose"}
    registered = {method.policy.__module__.rpartition(".")[2] for method in METHODS.values()}
    assert registered == files and len(METHODS) == len(files)


def test_a_decorator_is_all_that_a_method_needs() -> None:
    @register_method("brightest", "Largest states", "nobody", stages=(2,))
    class Brightest(Policy):
        pass

    method = METHODS["brightest"]
    assert list(METHODS)[-1] == "brightest" and method_of("brightest") is method
    assert (method.title, method.paper, method.stages, method.trained) == ("Largest states", "nobody", (2,), False)
    assert isinstance(method.make(), Brightest)
    assert schedule_for("brightest", 192) == schedule_for("fastv", 192)
    register_method("brightest", staged=True)(FastV)  # the later one counts
    assert METHODS["brightest"].title == "FastV" and METHODS["brightest"].staged


@pytest.mark.parametrize("name", ["", "a+b", "a:b"])
def test_names_that_mean_something_else_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"name='.*' must not be empty"):
        register_method(name)


def test_which_families_a_method_applies_to() -> None:
    def titles(name: str) -> list[str]:
        return [family.title for family in FAMILIES.values() if not method_of(name).refuses(family)]

    from_layer_0 = [family.title for family in FAMILIES.values() if not family.min_stage]
    assert titles("visionzip") == titles("downsample") == from_layer_0 and "InternVL3" in from_layer_0
    assert titles("visionzip+fastv") == titles("visionzip")
    assert len(titles("fastv")) == len(FAMILIES)


def test_names_that_moved() -> None:
    with pytest.raises(TypeError, match=r"toprl_models\.METHODS"):
        toprl_models.methods()
    for _ in range(2):  # a failed import is not remembered
        with pytest.raises(ImportError, match=r"toprl_models\.methods now.*toprl_models\.METHODS"):
            importlib.import_module("toprl_models.baselines")


# --- a class in a file ---


def test_a_class_in_a_file(tmp_path: Path) -> None:
    name = f"{write(tmp_path)}:Brightest"
    method = method_of(name)
    assert (method.name, method.title, method.staged) == (name, "Brightest", True)
    model = build_model("llava")
    schedule = schedule_for(model, name, keep=0.5)
    with attach(model, method.make(), schedule=schedule) as pruner:
        assert type(pruner.policy).__name__ == "Brightest"
    assert method_of(name).policy is method.policy  # read once
    os.utime(tmp_path / "my_file.py", (1, 1))  # and again where it changed
    assert method_of(name).policy is not method.policy
    assert plugins.files_of(f"fastv+{name}") == [tmp_path / "my_file.py"]


def test_a_file_may_register_its_class(tmp_path: Path) -> None:
    path = write(tmp_path, '@register_method("brightest", "Largest states", stages=(0,))')
    method = method_of(name := f"{path}:Brightest")
    assert (method.name, method.title, method.stages, method.staged) == (name, "Largest states", (0,), False)
    assert METHODS["brightest"].policy is method.policy


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no_file.py:Brightest", ValueError, "no_file.py:Brightest.*no Python file .*give path:Class"),
        (":Brightest", ValueError, "no Python file"),
        ("{path}:Darkest", ValueError, "my_file.py has no Darkest; policies in it: Brightest"),
        (
            "{path}:LIMIT",
            ValueError,
            "as something else than a toprl_models.Policy the name LIMIT; policies .*Brightest",
        ),
        ("{broken}:Brightest", ImportError, r"broken.py cannot be imported \(NameError: name 'nothing'"),
        ("brightest", ValueError, "'brightest' is unknown; known methods: toprl, .*my_file.py:MyMethod.*joined by"),
        ("fastv+", ValueError, "method '' is unknown"),
    ],
)
def test_what_is_no_method(name: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    path, broken = write(tmp_path), write(tmp_path, "nothing", "broken.py")
    with pytest.raises(error, match=message):
        method_of(name.format(path=path, broken=broken))


# --- entry points ---


def install(folder: Path, value: str, source: str) -> None:
    """A package as pip would leave it: a module, and a dist-info that says which method it brings."""
    (folder / "bright_package.py").write_text(source)
    info = folder / "bright_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bright-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[toprl.methods]\nbright = {value}\n")
    sys.path.insert(0, str(folder))
    sys.modules.pop("bright_package", None)
    importlib.invalidate_caches()


@pytest.mark.parametrize(
    ("value", "decorator", "stages"),
    [
        ("bright_package:Brightest", "", (2, 8, 16)),
        ("bright_package", '@register_method("bright", stages=(2,))', (2,)),
        ("bright_package:Brightest", '@register_method("bright", stages=(2,))', (2,)),
    ],
)
def test_an_installed_package_brings_methods(value: str, decorator: str, stages: tuple, tmp_path: Path) -> None:
    install(tmp_path, value, BRIGHTEST.format(decorator=decorator))
    assert plugins.names() == ["bright"] and "bright" not in METHODS
    with pytest.raises(ValueError, match=r"known methods: .*random, bright;"):
        method_of("brighter")
    assert "bright_package" not in sys.modules  # lazily
    method = method_of("bright")
    assert method.stages == stages and METHODS["bright"] is method and plugins.names() == []
    assert type(method.make()).__name__ == "Brightest"
    assert method_of("divprune+bright").parts[1] is method


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module", "package bright-plugin brings it as .*cannot be imported .*no_such_module"),
        ("Brightest = 3", "of package bright-plugin is neither a toprl_models.Policy"),
    ],
)
def test_a_broken_package_is_named(source: str, message: str, tmp_path: Path) -> None:
    install(tmp_path, "bright_package:Brightest", source)
    with pytest.raises(ImportError, match=f"method 'bright': .*{message}"):
        method_of("bright")
    assert method_of("fastv") is METHODS["fastv"]


def test_the_page_on_methods_runs() -> None:
    page = (Path(__file__).parents[2] / "docs/methods.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, {"__name__": "page"})
    assert METHODS["sharpest"].stages == (2,)
