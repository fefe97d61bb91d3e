"""Training in real processes: killed, told to stop, several of them."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training.processes import ROOT, Runner
from toprl_models import TopRLPolicy

pytestmark = pytest.mark.slow

FLAGS = {
    "iterations": 6,
    "rollout_size": 15,
    "minibatch_size": 8,
    "ppo_epochs": 2,
    "train_size": 24,
    "actor_size": 16,
    "save_every": 2,
    "eval_every": 3,
    "eval_size": 8,
    "device": "cpu",
}
CALLS = 9_900  # calls of Python functions; an iteration makes 9,989


@pytest.fixture(scope="module")
def runner():
    with Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def uninterrupted(runner, tmp_path_factory):
    """Weights at the end of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    (code,) = runner.wait(*runner.start(folder / "log", process(folder / "run")))
    assert code == 0, (folder / "log").read_text()
    return folder / "run"


def process(folder: Path, **changes):
    return {"config": FLAGS | {"output_dir": str(folder)} | changes, "environment": {}}


def signalled(process: dict, number: int, iteration: int, calls: int) -> dict:
    """The process, which gets a signal ``calls`` calls of functions after the start of an iteration."""
    return {**process, "signal": {"signal": int(number), "iteration": iteration, "calls": calls}}


def weights(folder: Path):
    return TopRLPolicy.from_pretrained(folder).state_dict()


def rows(folder: Path, name: str = "metrics") -> list[dict]:
    path = folder / f"{name}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # the last one may be unfinished
    return [json.loads(line) for line in lines]


def timeless(found: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in found]


def same(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def wait_for_rows(folder: Path, count: int) -> None:
    end = time.perf_counter() + 60
    while len(rows(folder)) < count:
        assert time.perf_counter() < end, f"{len(rows(folder))} of {count} rows after a minute"
        time.sleep(0.02)


def test_a_run_killed_at_random_moments_ends_bitwise_the_same(runner, uninterrupted, tmp_path):
    """Before and after the first checkpoint, and twice in the last iteration."""
    draw, run = random.Random(0), process(tmp_path / "run", resume="auto")
    for iteration in (1, 3, 4, 5, 5):
        killed = signalled(run, signal.SIGKILL, iteration, draw.randrange(CALLS))
        codes = runner.wait(*runner.start(tmp_path / "log", killed))
        assert codes == [-signal.SIGKILL], (tmp_path / "log").read_text()
    assert runner.wait(*runner.start(tmp_path / "log", run)) == [0], (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("resumed after iteration") == 4  # all but the first two
    for name, iterations in (("metrics", [0, 1, 2, 3, 4, 5]), ("validation", [0, 3, 6])):
        whole, resumed = (timeless(rows(folder, name)) for folder in (uninterrupted, tmp_path / "run"))
        assert [row["iteration"] for row in whole] == iterations
        assert whole == resumed
    assert same(weights(uninterrupted / "best"), weights(tmp_path / "run" / "best"))
    assert same(weights(uninterrupted / "policy"), weights(tmp_path / "run" / "policy"))


def test_sigterm_writes_a_checkpoint_and_exits(runner, uninterrupted, tmp_path):
    """Even between two regular checkpoints nothing that was computed is lost."""
    changes = {"save_every": 100, "resume": "auto"}
    told = signalled(process(tmp_path / "run", **changes), signal.SIGTERM, 3, CALLS // 2)
    (code,) = runner.wait(*runner.start(tmp_path / "log", told))
    assert code == 128 + signal.SIGTERM
    output = (tmp_path / "log").read_text()
    assert "SIGTERM" in output and "--resume auto" in output
    before = len(rows(tmp_path / "run"))
    assert before in (3, 4)  # it may finish the iteration
    (code,) = runner.wait(*runner.start(tmp_path / "log2", process(tmp_path / "run", **changes)))
    assert code == 0
    assert f"resumed after iteration {before}" in (tmp_path / "log2").read_text()
    assert same(weights(uninterrupted / "policy"), weights(tmp_path / "run" / "policy"))


def together(folder: Path, size: int, **changes) -> list[dict]:
    """The processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    return [
        {**process(folder, **changes), "environment": shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}}
        for rank in range(size)
    ]


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_train_the_same_policy(runner, uninterrupted, tmp_path, size):
    """15 episodes: the blocks of two processes are 7 and 8."""
    codes = runner.wait(*runner.start(tmp_path / "log", *together(tmp_path / "run", size)))
    assert codes == [0] * size, (tmp_path / "log").read_text()
    one, many = weights(uninterrupted / "policy"), weights(tmp_path / "run" / "policy")
    moved = max((value - torch.zeros_like(value)).abs().max() for value in one.values())
    for name in one:
        torch.testing.assert_close(many[name], one[name], atol=2e-4 * float(moved), rtol=1e-3, msg=name)
    for here, there in zip(rows(uninterrupted), rows(tmp_path / "run"), strict=True):
        assert here["retained"] == pytest.approx(there["retained"], abs=1e-6)
        assert here["reward"] == pytest.approx(there["reward"], abs=1e-5)
    assert (tmp_path / "log").read_text().count("policy:") == 1  # one process reports


def test_resuming_with_another_number_of_processes(runner, uninterrupted, tmp_path):
    run = [signalled(one, signal.SIGKILL, 5, CALLS // 2) for one in together(tmp_path / "run", 2, resume="auto")]
    assert -signal.SIGKILL in runner.wait(*runner.start(tmp_path / "log", *run))  # the other may see it first
    assert len(rows(tmp_path / "run")) < FLAGS["iterations"]
    (code,) = runner.wait(*runner.start(tmp_path / "log", process(tmp_path / "run", resume="auto")))
    assert code == 0, (tmp_path / "log").read_text()
    assert "resumed after iteration" in (tmp_path / "log").read_text()
    one, many = weights(uninterrupted / "policy"), weights(tmp_path / "run" / "policy")
    for name in one:
        torch.testing.assert_close(many[name], one[name], atol=1e-3, rtol=1e-3)


def test_a_dead_process_ends_the_others(runner, tmp_path):
    pids = runner.start(tmp_path / "log", *together(tmp_path / "run", 2, iterations=1000))
    wait_for_rows(tmp_path / "run", 1)
    os.kill(pids[1], signal.SIGKILL)
    began = time.perf_counter()
    codes = runner.wait(*pids)
    assert time.perf_counter() - began < 60
    assert codes[1] == -signal.SIGKILL and codes[0] == 1
    assert "another process of this run" in (tmp_path / "log").read_text()


def test_torchrun(tmp_path):
    """The command of the documentation."""
    flags = [part for name, value in FLAGS.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = subprocess.run(
        [*command, "training/ppo.py", *flags, "--iterations", "2", "--output_dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert len(rows(tmp_path)) == 2
    assert ended.stdout.count("policy:") == 1
