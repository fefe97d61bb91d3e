"""Checkpoints: whole or not there, whenever the writer dies; full disks; what a resumed run takes up."""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from toprl_models import TopRLPolicy
from training.trainer import checkpoint
from training.trainer.checkpoint import (
    CheckpointError,
    Writer,
    checkpoints,
    damage,
    load_checkpoint,
    publish,
    save_best,
    save_checkpoint,
    start_anew,
)
from training.trainer.config import PPOConfig

CONFIG = PPOConfig()
FINGERPRINT = {"samples": "a", "code": {"training": "b"}}


def make_policy(number: float = 0.0) -> TopRLPolicy:
    """All weights are ``number``: which save they are of."""
    policy = TopRLPolicy(8, [1, 2], 4, metadata={"task": "ocr"})
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(number)
    return policy


def make_state(number: int, config: PPOConfig = CONFIG):
    rest = {"config": dataclasses.asdict(config), "fingerprint": FINGERPRINT}
    return {"iteration": number, "tensor": torch.full((1000,), float(number)), **rest}


def save(folder: Path, number: int, keep: int = 2) -> None:
    save_checkpoint(folder, make_policy(number), make_state(number), keep)


def loaded(folder: Path) -> int:
    """The iteration of what is loaded; all its parts are of one save."""
    policy = make_policy(-1)
    state = load_checkpoint(folder, policy, CONFIG, FINGERPRINT)
    if state is None:
        return 0
    number = state["iteration"]
    assert (state["tensor"] == number).all()
    assert all((parameter == number).all() for parameter in policy.parameters())
    return number


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_stay_and_are_ordinary_policy_folders(tmp_path):
    for number in range(1, 6):
        save(tmp_path, number, keep=3)
    assert names(tmp_path) == ["iteration_000003", "iteration_000004", "iteration_000005", "latest"]
    assert os.readlink(tmp_path / "latest") == "iteration_000005"
    policy = TopRLPolicy.from_pretrained(tmp_path / "latest")
    assert (policy.head.bias == 5).all() and policy.metadata["task"] == "ocr"
    subprocess.run(["sha256sum", "--check", "--quiet", "checksums.sha256"], cwd=tmp_path / "latest", check=True)
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["iteration_000006", "latest"] and loaded(tmp_path) == 6


def test_state_is_read_as_weights_only(tmp_path):
    save_checkpoint(tmp_path, make_policy(), make_state(1) | {"object": threading.Event})
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        loaded(tmp_path)


class Killed(BaseException):
    """As SIGKILL: no clean-up runs (``except Exception`` does not see it)."""


STEPS = [
    (os, "replace"),
    (os, "symlink"),
    (os, "fsync"),
    (shutil, "rmtree"),
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "write_bytes"),
    (Path, "write_text"),
    (TopRLPolicy, "save_pretrained"),
]


def fails_at(patch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Let the ``step``-th thing that is done to the disk, from 0, raise ``error`` instead."""
    done: list[str] = []

    def wrap(owner, name):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            done.append(name)
            if len(done) == step + 1:
                raise error
            return real(*args, **kwargs)

        patch.setattr(owner, name, wrapped)

    for owner, name in STEPS:
        wrap(owner, name)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_writer_that_dies_at_any_step_leaves_a_whole_checkpoint(tmp_path, keep):
    save(tmp_path / "before", 1, keep)
    save(tmp_path / "before", 2, keep)
    step = 0
    for step in range(100):
        folder = tmp_path / f"step{step}"
        shutil.copytree(tmp_path / "before", folder, symlinks=True)
        with pytest.MonkeyPatch.context() as patch:
            fails_at(patch, step, Killed())
            try:
                save(folder, 3, keep)
                break
            except Killed:
                pass
        assert loaded(folder) in (2, 3), step
        assert damage(folder / "latest") is None, step
        save(folder, 4, keep)  # what was left over goes
        assert len(names(folder)) == keep + 1 and loaded(folder) == 4, (step, names(folder))
    assert 15 < step < 99


def test_a_failing_write_is_named_and_the_last_checkpoint_stays(tmp_path):
    save(tmp_path / "before", 1)
    save(tmp_path / "before", 2)
    failed = 0
    for step in range(100):
        folder = tmp_path / f"step{step}"
        shutil.copytree(tmp_path / "before", folder, symlinks=True)
        with pytest.MonkeyPatch.context() as patch:
            fails_at(patch, step, OSError(28, "No space left on device"))
            try:
                save(folder, 3)
            except CheckpointError as error:
                failed += 1
                message = str(error)
                assert str(folder) in message and "No space left" in message and "MB free" in message, step
                assert "iteration_00000" in message.split("last good one")[1] and "is whole" in message, step
            else:
                break
        assert loaded(folder) in (2, 3), step
        assert damage(folder / "latest") is None, step
    assert failed > 12
    with pytest.MonkeyPatch.context() as patch:
        fails_at(patch, 3, OSError(28, "No space left on device"))
        with pytest.raises(CheckpointError, match="there is none before it"):
            save(tmp_path / "new", 1)


@pytest.mark.parametrize("limit", [0, 300, 2000, 4000])
def test_files_that_cannot_grow(tmp_path, limit):
    """Really failing writes, of policy, checksums and state, without a disk of one's own to fill."""
    save(tmp_path, 1)
    largest = max(path.stat().st_size for path in (tmp_path / "latest").iterdir())
    assert largest > 4000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"File too large.*iteration_000001 is whole"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["iteration_000001", "latest"] and loaded(tmp_path) == 1


def save_forever(folder: Path) -> None:
    os.write(1, f"pid {os.getpid()}\n".encode())
    number = loaded(folder)
    while True:
        number += 1
        save(folder, number)
        os.write(1, f"saved {number}\n".encode())


FORKS = """
import os, sys
from pathlib import Path
from tests.training.test_checkpoint import save_forever
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        save_forever(Path(sys.argv[1]))
    print("dead", os.WTERMSIG(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_writer_killed_at_random_moments(tmp_path):
    """Processes that save one checkpoint after the other; each goes on behind the one that was killed before it."""
    root = Path(__file__).resolve().parents[2]
    server = subprocess.Popen(
        [sys.executable, "-c", FORKS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    assert server.stdin is not None and server.stdout is not None
    last, cut_off = 0, 0
    for _ in range(20):
        server.stdin.write("\n")
        server.stdin.flush()
        pid = int(server.stdout.readline().removeprefix("pid"))
        last = int(server.stdout.readline().removeprefix("saved"))
        time.sleep(random.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        while (line := server.stdout.readline())[:4] != "dead":
            last = int(line.removeprefix("saved"))
        assert line == "dead 9\n"
        cut_off += any(path.suffix == ".tmp" for path in tmp_path.iterdir())
        assert loaded(tmp_path) in (last, last + 1)
    server.stdin.close()
    assert server.wait() == 0
    assert last >= 20 and cut_off


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.pt", "checksums.sha256"])
def test_a_damaged_checkpoint_is_named_and_not_loaded(tmp_path, capsys, harm, name):
    folder, other = tmp_path / "checkpoints", tmp_path / "other"
    save(folder, 1)
    save(folder, 2)
    harm(folder / "iteration_000002" / name)
    assert loaded(folder) == 1
    what = name if name != "checksums.sha256" or harm == Path.unlink else ""
    assert f"iteration_000002: {what}" in capsys.readouterr().out
    shutil.copytree(folder, other, symlinks=True)
    save(folder, 2, keep=1)  # the resumed run comes to it again
    assert loaded(folder) == 2 and names(folder) == ["iteration_000002", "latest"]
    save(other, 1, keep=1)  # a damaged one is not one of the newest either
    assert loaded(other) == 1 and names(other) == ["iteration_000001", "latest"]
    harm(other / "iteration_000001" / name)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole.*iteration_000001"):
        loaded(other)


def test_flags_that_must_and_that_need_not_be_the_same(tmp_path):
    save(tmp_path, 1)
    changed = {"resume": "auto", "output_dir": "moved", "device": "cpu", "save_every": 1, "keep_checkpoints": 9}
    assert load_checkpoint(tmp_path, make_policy(), dataclasses.replace(CONFIG, **changed), FINGERPRINT) is not None
    for name, value in {"gamma": 0.5, "iterations": 41, "seed": 1}.items():
        with pytest.raises(ValueError, match=rf"other flags: {{'{name}': \(.*, {value}\)}} \(theirs, ours\)"):
            load_checkpoint(tmp_path, make_policy(), dataclasses.replace(CONFIG, **{name: value}), FINGERPRINT)
    assert load_checkpoint(tmp_path / "none", make_policy(), CONFIG, FINGERPRINT) is None


def test_the_best_policy_is_replaced_whole(tmp_path):
    for number in (0, 20):
        save_best(tmp_path, make_policy(number), {"iteration": number, "reward": 0.5})
        assert damage(tmp_path / "best") is None
    policy = TopRLPolicy.from_pretrained(tmp_path / "best")
    assert (policy.head.bias == 20).all()
    assert policy.metadata == {"task": "ocr", "validation": {"iteration": 20, "reward": 0.5}}
    assert names(tmp_path / "best_policies") == ["iteration_000020"]
    with pytest.MonkeyPatch.context() as patch:
        fails_at(patch, 4, OSError(28, "No space left on device"))
        with pytest.raises(CheckpointError, match="iteration_000020 is whole"):
            save_best(tmp_path, make_policy(30), {"iteration": 30})
    assert (TopRLPolicy.from_pretrained(tmp_path / "best").head.bias == 20).all()


def test_a_new_run_does_not_begin_over_another(tmp_path):
    (tmp_path / "policy").mkdir()
    start_anew(tmp_path, overwrite=False)
    assert names(tmp_path) == ["policy"]  # there is no run that it could be of
    save(tmp_path / "checkpoints", 3)
    save_best(tmp_path, make_policy(), {"iteration": 0})
    with pytest.raises(ValueError, match=r"holds a run \(iteration_000003\).*--resume auto.*--overwrite"):
        start_anew(tmp_path, overwrite=False)
    assert loaded(tmp_path / "checkpoints") == 3
    start_anew(tmp_path, overwrite=True)
    assert names(tmp_path) == []


def test_the_writer_copies_and_does_not_wait(tmp_path, monkeypatch):
    may_write, real = threading.Event(), checkpoint.save_checkpoint

    def slow(*args):
        assert may_write.wait(20)
        return real(*args)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    writer, policy, state = Writer(tmp_path, keep=3), make_policy(1), make_state(1)
    state["optimizer"] = {"state": {0: [state["tensor"], (state["tensor"],)]}}
    writer.save(policy, state)
    with torch.no_grad():
        policy.head.bias.fill_(7)
    state["tensor"].fill_(7)
    writer.save(make_policy(2), make_state(2))  # one is written, one waits
    assert not (tmp_path / "checkpoints").exists()
    threading.Timer(0.2, may_write.set).start()
    writer.save(make_policy(3), make_state(3))  # waits for the first
    assert may_write.is_set()
    assert damage(tmp_path / "checkpoints/iteration_000001") is None
    writer.close()
    assert [path.name[-1] for path in checkpoints(tmp_path / "checkpoints")] == ["1", "2", "3"]
    first = torch.load(tmp_path / "checkpoints/iteration_000001/trainer_state.pt", weights_only=True)
    one, (two,) = first["optimizer"]["state"][0]
    assert (one == 1).all() and (two == 1).all() and (first["tensor"] == 1).all()
    assert (TopRLPolicy.from_pretrained(tmp_path / "checkpoints/iteration_000001").head.bias == 1).all()


def test_an_error_of_the_writer_comes_up_at_the_next_call_or_at_the_end(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    writer = Writer(tmp_path, keep=2)
    writer.save(make_policy(), make_state(1))
    while not writer._pending[0].done():
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match="iteration_000001"):
        writer.save(make_policy(), make_state(2))
    writer.save(make_policy(), make_state(3))
    with pytest.raises(CheckpointError, match="iteration_000003"):
        writer.close()


@pytest.mark.parametrize("last", [5, 7])
def test_the_best_policy_is_published_and_the_last_stays(tmp_path, last):
    row = {"iteration": 20, "reward": 0.5, "accuracy": 0.8, "full_accuracy": 0.9}
    save_best(tmp_path, make_policy(5), row)
    (tmp_path / "policy_last").mkdir()  # of a run before
    said = publish(tmp_path, make_policy(last))
    published = TopRLPolicy.from_pretrained(tmp_path / "policy")
    assert (published.head.bias == 5).all() and published.metadata["validation"] == row
    assert not (tmp_path / "policy" / "checksums.sha256").exists()
    assert (tmp_path / "policy_last").exists() == (last != 5)
    assert ("the best, after iteration 20: reward 0.500, accuracy 0.800 of 0.900" in said) == (last != 5)


def test_without_validations_the_last_policy_is_published(tmp_path):
    assert "nothing was validated" in publish(tmp_path, make_policy(7))
    assert (TopRLPolicy.from_pretrained(tmp_path / "policy").head.bias == 7).all()
