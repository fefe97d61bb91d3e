"""What a run writes about itself, and what is noticed in it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import threading
import types

import pytest
import torch

from training.trainer.config import PPOConfig
from training.trainer.log import Log
from training.trainer.validation import standing
from training.trainer.watch import CollapseError, NotFiniteError, Watch, findings, naming_checkpoint, require_finite

HEALTHY = {
    "accuracy": 0.9,
    "reward": 1.2,
    "reward_std": 0.3,
    "advantage_std": 0.2,
    "retained": [0.5, 0.3, 0.1],
    "entropy": 0.4,
    "ratio_max": 1.5,
    "kl_k3": 0.01,
    "grad_norm": 0.3,
}


def rows(number: int, first: int = 0, **changes):
    return [HEALTHY | changes | {"iteration": first + i} for i in range(number)]


KEEP_NONE = {"retained": [0.2, 0.01, 0.002], "accuracy": 0.5}
KEEP_ALL = {"retained": [1.0, 0.99, 0.99]}


@pytest.mark.parametrize(
    ("history", "kind"),
    [
        (rows(3, grad_norm=math.nan), "not finite"),
        (rows(3, retained=[0.5, math.inf, 0.1]), "not finite"),
        (rows(5) + rows(5, 5, **KEEP_NONE), "keep-none"),
        (rows(5, **KEEP_ALL), "keep-all"),
        (rows(1, advantage_std=0.0), "zero advantage"),
        (rows(1, reward_std=0.0), "zero advantage"),
        (rows(1, entropy=0.01), "entropy gone"),
        (rows(1, ratio_max=50.0), "update too large"),
        (rows(1, kl_k3=0.9), "update too large"),
    ],
)
def test_what_is_wrong_is_named(history, kind):
    assert list(findings(history, 40)) == [kind]


@pytest.mark.parametrize(
    "history",
    [
        [],
        rows(40),
        rows(5) + rows(4, 5, **KEEP_NONE),  # not for long enough
        rows(9) + rows(9, 9, retained=[0.2, 0.01, 0.002]),  # prunes everything, and still answers
        rows(9) + rows(9, 9, accuracy=0.5),  # explores: few answers, many tokens
        rows(4, **KEEP_ALL),
        rows(9, 20, entropy=0.01),  # decided in the end
    ],
)
def test_what_is_healthy_is_not(history):
    assert findings(history, 40) == {}


def test_a_finding_is_told_once_and_again_when_it_comes_back(capsys):
    watch = Watch(PPOConfig())
    told = [watch.check(row) for row in rows(2) + rows(3, 2, kl_k3=0.9) + rows(1, 5) + rows(1, 6, kl_k3=0.9)]
    assert [len(new) for new in told] == [0, 0, 1, 0, 0, 0, 1]
    assert told[2] == ["iteration 2: update too large: largest ratio 1.5, KL 0.90"]
    assert capsys.readouterr().out == f"warning: {told[2][0]}\nwarning: {told[6][0]}\n"


def test_a_resumed_watch_tells_what_the_uninterrupted_one_does():
    history = rows(5) + rows(20, 5, **KEEP_NONE) + rows(2, 25) + rows(9, 27, **KEEP_ALL)
    whole = Watch(PPOConfig())
    told = [whole.check(row) for row in history]
    assert sum(map(len, told)) == 2
    for cut in range(len(history)):
        resumed = Watch(PPOConfig(), history[:cut])
        assert [resumed.check(row) for row in history[cut:]] == told[cut:], cut


def test_a_collapse_stops_or_is_ignored_as_asked(capsys):
    with pytest.raises(CollapseError, match="iteration 0: zero advantage"):
        Watch(PPOConfig(on_collapse="stop")).check(rows(1, reward_std=0.0)[0])
    assert Watch(PPOConfig(on_collapse="ignore")).check(rows(1, reward_std=0.0)[0]) == []
    assert capsys.readouterr().out == ""


def test_nan_is_named_before_it_is_used(tmp_path):
    require_finite(rewards=torch.ones(3), values=torch.zeros(0))
    bad = {"rewards": torch.tensor([1.0, math.nan, 2.0]), "fine": torch.ones(2), "loss": torch.tensor(-math.inf)}
    with pytest.raises(NotFiniteError, match=r"^NaN or infinity in rewards \(1 of 3\), loss \(1 of 1\)$"):
        require_finite(**bad)
    with (
        pytest.raises(NotFiniteError, match=r"iteration 7: .*rewards \(1 of 3\).*no checkpoint yet"),
        naming_checkpoint(tmp_path, 7),
    ):
        require_finite(**bad)
    (tmp_path / "iteration_000005").mkdir()
    with pytest.raises(NotFiniteError, match=r"checkpoint is \S*iteration_000005"), naming_checkpoint(tmp_path, 7):
        require_finite(**bad)


# --- the log ---


def contents(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(log, first, last):
    """A run that validates before every second iteration."""
    for iteration in range(first, last):
        if iteration % 2 == 0:
            log.validation({"iteration": iteration, "reward": float(iteration)})
        log.write({"iteration": iteration, "retained": [0.5, 0.25], "reward": float(iteration)})


@pytest.mark.parametrize("end", [0, 1, 2, 5, 6])
def test_a_resumed_log_goes_on_where_the_checkpoint_was(tmp_path, end):
    """Killed after 6 iterations, the next line half written; the checkpoint is of ``end``."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
        log = Log(folder, 0)
        write(log, 0, 6)
        log.close()
    for name in ("metrics.jsonl", "validation.jsonl"):
        with open(cut / name, "a") as file:
            file.write('{"iteration": 6, "ret')
    log = Log(cut, end)
    assert [row["iteration"] for row in log.rows] == list(range(end))
    write(log, end, 8)
    log.close()
    log = Log(whole, 6)
    write(log, 6, 8)
    log.close()
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert [row["iteration"] for row in contents(cut / "validation.jsonl")] == [0, 2, 4, 6]


def test_cutting_never_leaves_half_a_file(tmp_path, monkeypatch):
    log = Log(tmp_path, 0, "none")
    write(log, 0, 6)
    log.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Log(tmp_path, 3, "none")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_line_that_is_no_row_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n{"iterat\n{"iteration": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not JSON: '{\"iterat'"):
        Log(tmp_path, 3, "none")


def test_rows_are_written_behind_the_run(tmp_path, monkeypatch):
    """Who writes does not wait; what went wrong comes with a later call, and again nothing is lost before it."""
    log, goes_on = Log(tmp_path, 0, "none"), threading.Event()
    monkeypatch.setattr(log.tracker, "log", lambda *args: goes_on.wait(10))
    write(log, 0, 3)
    assert len(contents(tmp_path / "metrics.jsonl")) < 3
    goes_on.set()
    log.close()
    assert len(contents(tmp_path / "metrics.jsonl")) == 3

    def full(*args):
        raise OSError(28, "No space left on device")

    log = Log(tmp_path, 3, "none")
    monkeypatch.setattr(log.tracker, "log", full)
    write(log, 3, 4)
    with pytest.raises(OSError, match="No space left"):
        log.close()


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path, 0)
    write(log, 0, 3)
    log._pending[-1].result()  # what a killed run has written is there without closing
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("retained/stage_2")] == [0.25] * 3
    assert [event.step for event in events.Scalars("validation/reward")] == [0, 2]
    log.close()


def test_a_tracker_that_is_missing_or_there(tmp_path, monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"--report_to {name}: .*pip install {name}"):
            Log(tmp_path, 0, name)
    calls = []
    fake = types.SimpleNamespace(
        init=lambda **kwargs: calls.append(kwargs),
        log=lambda numbers, step: calls.append((step, numbers)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    log = Log(tmp_path, 0, "trackio", {"seed": 3})
    log.write({"iteration": 0, "retained": [0.5, 0.25]})
    log.validation({"iteration": 1, "reward": 2.0})
    log.close()
    assert calls[0] == {"project": "toprl", "name": tmp_path.name, "config": {"seed": 3}}
    assert calls[1:] == [
        (0, {"iteration": 0, "retained/stage_1": 0.5, "retained/stage_2": 0.25}),
        (1, {"validation/iteration": 1, "validation/reward": 2.0}),
        "finish",
    ]
    with pytest.raises(ValueError, match="--report_to mlflow must be one of tensorboard, wandb, trackio, none"):
        dataclasses.replace(PPOConfig(), report_to="mlflow")


def validation(iteration: int, accuracy: float, reward: float = 1.0) -> dict:
    return {"iteration": iteration, "accuracy": accuracy, "full_accuracy": 0.8, "reward": reward}


def test_lost_accuracy_is_named(capsys):
    watch = Watch(PPOConfig())
    assert watch.check_validation(validation(10, 0.73)) == ""  # 90 % of 0.8 is 0.72
    assert watch.check_validation(validation(0, 0.1)) == ""  # before training
    found = watch.check_validation(validation(20, 0.71))
    assert found.startswith("iteration 20: accuracy lost: 0.710 by") and found in capsys.readouterr().out
    assert Watch(PPOConfig(on_collapse="ignore")).check_validation(validation(20, 0.1)) == ""
    with pytest.raises(CollapseError, match="iteration 20: accuracy lost"):
        Watch(PPOConfig(on_collapse="stop")).check_validation(validation(20, 0.1))


def test_reward_does_not_make_up_for_lost_accuracy():
    rows = [validation(10, 0.75, 1.2), validation(20, 0.8, 1.1), validation(30, 0.6, 1.9), validation(40, 0.5, 2.0)]
    assert [row["iteration"] for row in sorted(rows, key=standing)] == [30, 40, 20, 10]
