"""Pytest plugin for transformers' own tests: a pruner that keeps everything on every model they build, and a report.

``run.py`` loads it as ``-p plugin`` into a pytest that runs in a checkout of transformers, where ``tests`` is their
package and not ours; so this file imports nothing of the tests it lies among.
"""

from __future__ import annotations

import json
import random
import sys
import weakref
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, set_seed

from toprl_models import Policy, Schedule, attach
from toprl_models.families import FAMILIES, min_stage_of
from toprl_models.probe import decoder_of
from toprl_models.runtime import compact
from toprl_models.runtime.state import Segment, gather_slots

VARIANTS = ("none", "keep-all", "gather", "drop")


class Constant(Policy):
    """All tokens are equally good; counts what it is asked."""

    calls = 0

    def score(self, context):
        Constant.calls += 1
        return torch.zeros_like(context.visual_index, dtype=torch.float32)


class Attacher:
    """Attaches a pruner to every supported model, as soon as it is built.

    A model that ``from_pretrained`` builds gets it when that returns: before, it is a skeleton without weights.
    """

    def __init__(self, keep: float) -> None:
        self.keep = keep
        self.counts: Counter[str] = Counter()
        self._attached: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
        self._loading = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        post_init, from_pretrained = PreTrainedModel.post_init, PreTrainedModel.from_pretrained.__func__

        def attached_post_init(model: PreTrainedModel) -> None:
            post_init(model)
            if not self._loading:
                self.attach(model)

        def attached_from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
            self._loading += 1
            try:
                result = from_pretrained(cls, *args, **kwargs)
            finally:
                self._loading -= 1
            if not self._loading:
                self.attach(result[0] if isinstance(result, tuple) else result)
            return result

        monkeypatch.setattr(PreTrainedModel, "post_init", attached_post_init)
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(attached_from_pretrained))

    def attach(self, model: PreTrainedModel) -> None:
        name = type(model).__name__
        if name not in FAMILIES or model in self._attached:  # some tests call post_init() again
            return
        first, num_layers = min_stage_of(model, FAMILIES[name]), len(decoder_of(model).layers)
        if first >= num_layers:
            self.counts["too few layers to attach"] += 1
            return
        attach(model, Constant(), schedule=Schedule(tuple((layer, self.keep) for layer in range(first, num_layers))))
        self._attached.add(model)
        self.counts["models attached"] += 1


def gather_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the shortcut of a stage that drops nothing away: gather all slots, rebuild masks and rotary tables.

    Padding stays where it is, which a stage would drop along: the tests look at the shapes of caches and attentions.
    """

    def gather(_, forward, stage, hidden_states, decision, counts, kwargs):
        before = forward.segment
        slots = torch.arange(forward.length, device=hidden_states.device).expand(len(hidden_states), -1)
        return gather_slots(hidden_states, slots), Segment(slots, before.valid, packing=before.packing)

    monkeypatch.setattr(compact, "drops_nothing", lambda *_: False)
    monkeypatch.setattr(compact.Compact, "_gather", gather)


# -- pytest ----------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("toprl")
    group.addoption("--toprl-pruner", choices=VARIANTS, default="none", help="what is attached to the models")
    group.addoption("--toprl-report", help="JSON file for the outcomes")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Judge(config), "toprl-judge")


class Judge:
    """Selects the tests of the model testers, seeds each, and writes down how it ended."""

    def __init__(self, config: pytest.Config) -> None:
        self.variant: str = config.getoption("toprl_pruner")
        self.path: str | None = config.getoption("toprl_report")
        self.groups: dict[str, str] = {}
        self.outcomes: dict[str, str] = {}
        self.attacher: Attacher | None = None
        self._patches = pytest.MonkeyPatch()

    def pytest_sessionstart(self) -> None:
        if self.variant == "none":
            return
        self.attacher = Attacher(keep=0.0 if self.variant == "drop" else 1.0)
        self.attacher.install(self._patches)
        if self.variant == "gather":
            gather_everything(self._patches)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        groups = {item: group_of(item) for item in items}
        config.hook.pytest_deselected(items=[item for item in items if groups[item] is None])
        items[:] = [item for item in items if groups[item] is not None]
        self.groups = {item.nodeid: str(groups[item]) for item in items}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        seed = zlib.crc32(item.nodeid.encode())
        set_seed(seed)
        random.seed(seed)
        # their inputs come from a generator of their own, which nobody seeds
        common = sys.modules.get("tests.test_modeling_common")
        if common is not None:
            common.global_rng.seed(seed)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, "context"):  # one of a test's subtests; a failure of it comes back as the test's own
            if report.failed:
                self.outcomes[report.nodeid] = "failed"
            return
        expected_to_fail = hasattr(report, "wasxfail")
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
        elif report.when == "call" or report.skipped:
            outcome = ("xpassed" if report.passed else "xfailed") if expected_to_fail else report.outcome
            self.outcomes.setdefault(report.nodeid, outcome)

    def pytest_sessionfinish(self) -> None:
        self._patches.undo()
        if self.path is None:
            return
        counts = dict(self.attacher.counts) if self.attacher else {}
        tests = {
            name: {"group": self.groups.get(name, "collection"), "outcome": outcome}
            for name, outcome in self.outcomes.items()
        }
        report = {"tests": tests, "counts": {**counts, "stages run": Constant.calls}}
        Path(self.path).write_text(json.dumps(report, indent=1))


def group_of(item: pytest.Item) -> str | None:
    """ "generation" or "common", or None for a test that builds no tiny model (integration tests, pipelines)."""
    cls = getattr(item, "cls", None)
    if not hasattr(cls, "all_model_classes"):
        return None
    name = item.name.split("[")[0]
    owners = [base.__module__.rpartition("tests.")[2] for base in cls.__mro__ if name in vars(base)]
    if "test_pipeline_mixin" in owners:
        return None
    return "generation" if "generation.test_utils" in owners else "common"
