"""Shared setup. Without a CUDA device the whole test process runs Triton kernels in the CPU interpreter.

The variable has to be set before the first import of triton, and torch may import it; hence the order here.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Generator
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

MATRIX = pytest.StashKey["Matrix"]()
HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA and "TOPRL_TESTS_COMPILED" not in os.environ:  # see test_compiled_lane.py
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    help_ = "store the outcomes of the families of which every feature was tested"
    parser.addoption("--write-features", action="store_true", help=help_)
    help_ = "add the outcomes of this run to those of earlier ones in this file, test by test, for --write-features"
    parser.addoption("--outcomes", type=Path, help=help_)
    help_ = "run every test function once, with the first of its parameters, and none that is marked slow"
    parser.addoption("--once", action="store_true", help=help_)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    marker = item.get_closest_marker("feature")
    if marker is not None and (report.when == "call" or report.outcome != "passed"):
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        family = item.callspec.params["family"]  # type: ignore[attr-defined]
        report.user_properties.append(("feature", (marker.args[0], family, report.outcome, reason)))
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Collect the matrix in the one process that sees all reports; complete columns must be the stored ones."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None:  # a worker
        return
    reports = [report for reports in terminal.stats.values() for report in reports]
    outcomes = {
        report.nodeid: value
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "feature"
    }
    if record := session.config.getoption("--outcomes"):
        outcomes = (json.loads(record.read_text()) if record.exists() else {}) | outcomes
        record.write_text(json.dumps(outcomes, indent=1))
    if not outcomes and not session.config.getoption("--write-features"):
        return
    # imports transformers, and triton after the interpreter was chosen
    from tests.models.features import Matrix

    matrix = session.config.stash[MATRIX] = Matrix()
    for outcome in outcomes.values():
        matrix.add(*outcome)
    if session.config.getoption("--write-features"):
        matrix.store()
    elif matrix.complete() and matrix.merged() != matrix.stored() and not HAS_CUDA:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        matrix.is_outdated = True


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    seconds: Counter[str] = Counter()
    for report in chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.partition("::")[0]] += report.duration
    if seconds.total() > 60:
        terminalreporter.section("seconds by file")
        terminalreporter.write_line(", ".join(f"{file} {time:.0f}" for file, time in seconds.most_common(20)))
    matrix = config.stash.get(MATRIX, None)
    if matrix is None:
        return
    if lines := matrix.lines():
        terminalreporter.section("families and features")
        terminalreporter.write("\n".join(lines) + "\n")
    if matrix.is_outdated:
        terminalreporter.write_line("FAILED: feature_matrix.json is out of date; run `make feature-matrix`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the installed release of transformers lacks or does wrong without a pruner, too."""
    installed = Version(metadata.version("transformers"))
    needed = {item: item.get_closest_marker("since") for item in items}
    too_old = [item for item, marker in needed.items() if marker and installed < Version(marker.args[0])]
    config.hook.pytest_deselected(items=too_old)
    items[:] = [item for item in items if item not in too_old]
    if config.getoption("--once"):
        first: dict[str, pytest.Item] = {}
        for item in items:
            if "slow" not in item.keywords:
                first.setdefault(item.nodeid.partition("[")[0], item)
        config.hook.pytest_deselected(items=[item for item in items if item not in first.values()])
        items[:] = first.values()
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_backend_override(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable in the developer's shell must not change which implementation a test runs."""
    monkeypatch.delenv("TOPRL_KERNELS_BACKEND", raising=False)
