"""Checkpoints of a training run: whole or not there, whenever the process dies.

    checkpoints/
        iteration_000035/    policy folder, trainer_state.pt, checksums.sha256
        iteration_000040/
        latest -> iteration_000040

A folder is written aside (``*.tmp`` beside its place), flushed to the disk and then renamed, so that a folder with its
final name is whole. The best policy is kept the same way: ``best`` is a link into ``best_policies/``.
"""

from __future__ import annotations

import copy
import hashlib
import io
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model

from toprl_models import TopRLPolicy
from training.fingerprint import differences
from training.trainer.config import PPOConfig

CHECKSUMS, STATE = "checksums.sha256", "trainer_state.pt"
MAY_CHANGE = (
    "resume",
    "output_dir",
    "overwrite",
    "device",
    "save_every",
    "keep_checkpoints",
    "report_to",
    "on_collapse",
    "ddp_timeout",
    "cache_dir",
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none that is there is whole."""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob("iteration_*") if path.suffix != ".tmp")


def save_checkpoint(folder: Path, policy: TopRLPolicy, state: dict[str, Any], keep: int = 2) -> Path:
    """Write ``folder/iteration_N``, N being ``state["iteration"]``; then older ones than the newest ``keep`` go.

    A whole checkpoint of that iteration stays as it is: the same run has written the same.

    Args:
        state: plain data and tensors: what ``torch.load(weights_only=True)`` reads.

    Raises:
        CheckpointError: something could not be written (disk full); earlier checkpoints are as they were.
    """

    def write(aside: Path) -> None:
        policy.save_pretrained(aside)
        content = io.BytesIO()  # torch's own writer hides what went wrong on the disk
        torch.save(state, content)
        (aside / STATE).write_bytes(content.getbuffer())

    return _publish(folder, f"iteration_{state['iteration']:06d}", write, folder / "latest", keep)


def save_best(folder: Path, policy: TopRLPolicy, row: dict[str, Any]) -> Path:
    """Let ``folder/best`` be ``policy``; its metadata hold ``row``, the validation that found it the best.

    Raises:
        CheckpointError: something could not be written; the best policy so far is as it was.
    """

    def write(aside: Path) -> None:
        config = policy._hub_mixin_config
        assert isinstance(config, dict)
        policy.save_pretrained(aside, config={**config, "metadata": {**policy.metadata, "validation": row}})

    return _publish(folder / "best_policies", f"iteration_{row['iteration']:06d}", write, folder / "best", keep=1)


def publish(folder: Path, last: TopRLPolicy) -> str:
    """Let ``folder/policy`` be the best policy, and ``folder/policy_last`` the last one where that is another.

    Without validations the last policy is the result.

    Returns:
        What was published and why, for the console.
    """
    policy, best = folder / "policy", folder / "best"
    for old in (policy, folder / "policy_last"):
        shutil.rmtree(old, ignore_errors=True)
    if not best.exists():
        last.save_pretrained(policy)
        return f"policy: {policy} (the last; nothing was validated)"
    shutil.copytree(best, policy, ignore=shutil.ignore_patterns(CHECKSUMS))
    chosen = TopRLPolicy.from_pretrained(policy)
    row = chosen.metadata["validation"]
    facts = f"reward {row['reward']:.3f}, accuracy {row['accuracy']:.3f} of {row['full_accuracy']:.3f} unpruned"
    mine, theirs = last.state_dict(), chosen.state_dict()
    if all(torch.equal(mine[name].cpu(), value) for name, value in theirs.items()):
        return f"policy: {policy} (the last, which is the best: {facts})"
    last.save_pretrained(folder / "policy_last")
    return f"policy: {policy} (the best, after iteration {row['iteration']}: {facts}; the last: policy_last)"


def _publish(parent: Path, name: str, write: Callable[[Path], None], link: Path, keep: int) -> Path:
    """``write`` a folder aside and rename it to ``parent/name``; let ``link`` name it; remove older ones."""
    target, aside, new_link = parent / name, parent / f"{name}.tmp", parent / f"{link.name}.tmp"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob("*.tmp"):  # of writers that were killed
            _remove(leftover)
        if damage(target):  # not there, as a rule; a damaged one was not resumed; a whole one is the same again
            write(aside)
            _seal(aside)
            if target.exists():
                _remove(target)
            os.replace(aside, target)
            _flush(parent)
        os.symlink(os.path.relpath(target, link.parent), new_link)
        os.replace(new_link, link)
        _flush(link.parent)
        known = checkpoints(parent)
        end = known.index(target) + 1
        for path in known[end:] + known[:end][:-keep]:  # newer ones are damaged, or this would not be written
            _remove(path)
    except Exception as error:  # a full disk is an OSError, a SafetensorError or a RuntimeError, by who wrote
        shutil.rmtree(aside, ignore_errors=True)
        whole = [path for path in checkpoints(parent) if damage(path) is None]
        last = f"{whole[-1]} is whole" if whole else "there is none before it"
        free = shutil.disk_usage(parent if parent.is_dir() else parent.parent).free
        raise CheckpointError(
            f"--output_dir: saving {target} failed ({type(error).__name__}: {error}); its disk has "
            f"{free / 1e6:.1f} MB free. The last good one: {last}. Free some space, then go on with --resume auto"
        ) from error
    return target


def _remove(path: Path) -> None:
    """A folder first loses its name, so that one that is half removed is not taken for a checkpoint."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    if path.suffix != ".tmp":
        path = path.rename(path.with_name(f"{path.name}.removed.tmp"))
    shutil.rmtree(path)


def _seal(folder: Path) -> None:
    """Write the checksums of all files (``sha256sum -c`` reads them), and flush everything to the disk."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join(lines))
    for path in (*files, folder / CHECKSUMS, folder):
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint or best policy, None where it is whole: its files are as they were written."""
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
        for line in lines:
            digest, name = line.split("  ", 1)
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError:
        return f"{CHECKSUMS} is not what was written"
    return None if lines else f"{CHECKSUMS} is empty"


def load_checkpoint(
    folder: Path, policy: TopRLPolicy, config: PPOConfig, fingerprint: dict[str, Any]
) -> dict[str, Any] | None:
    """The trainer state of the newest whole checkpoint, its weights put into ``policy``; None where there is none.

    A renamed checkpoint is whole unless the disk lost or changed something. One that is not is named on the console and
    the one before it is taken: the run repeats the iterations between, which gives the same numbers.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
        ValueError: flags differ from those of the checkpoint, other than ``MAY_CHANGE``; or samples, model or code do,
            which ``fingerprint`` tells.
    """
    problems = []
    for candidate in reversed(checkpoints(folder)):
        if problem := damage(candidate):
            problems.append(f"{candidate}: {problem}")
            print(f"--resume auto: {problems[-1]}; taking the checkpoint before it", flush=True)
            continue
        state = torch.load(candidate / STATE, weights_only=True, map_location="cpu")
        theirs, ours = (
            {name: value for name, value in flags.items() if name not in MAY_CHANGE}
            for flags in (state["config"], asdict(config))
        )
        if theirs != ours:
            names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
            different = {name: (theirs.get(name), ours.get(name)) for name in names}
            raise ValueError(f"--resume auto: the checkpoint was made with other flags: {different} (theirs, ours)")
        if changed := differences(state.get("fingerprint", {}), fingerprint):
            raise ValueError(
                f"--resume auto: {candidate} was made with other samples, model or code ({'; '.join(changed)}); bring "
                "those back, or train anew: --overwrite, or another --output_dir"
            )
        load_model(policy, candidate / "model.safetensors")
        return state
    if problems:
        raise CheckpointError(
            f"--resume auto: no checkpoint is whole ({'; '.join(problems)}); train anew into another --output_dir"
        )
    return None


def start_anew(folder: Path, overwrite: bool) -> None:
    """Let a run that is not resumed begin in ``folder``: no checkpoint or policy of another run is left in it.

    Raises:
        ValueError: there are checkpoints and not ``overwrite``.
    """
    found = checkpoints(folder / "checkpoints")
    if found and not overwrite:
        raise ValueError(
            f"--output_dir {folder} holds a run ({found[-1].name}): go on with it (--resume auto), choose another "
            "--output_dir, or delete it and start again (--overwrite)"
        )
    (folder / "best").unlink(missing_ok=True)
    for name in ("best_policies", "checkpoints", *(["policy", "policy_last"] if found else [])):
        shutil.rmtree(folder / name, ignore_errors=True)


class Writer:
    """Writes checkpoints and best policies in a thread of its own, in the order they are given.

    What is given is copied at once, so that training goes on with the originals. One is written while one more may
    wait; who gives a third waits until the first is done. What went wrong is raised by the next call or by ``close``.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Checkpoints go to ``folder/checkpoints``, where the newest ``keep`` stay, the best policy to ``folder``."""
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: list[Future[Path]] = []

    def save(self, policy: TopRLPolicy, state: dict[str, Any]) -> None:
        """``save_checkpoint`` of what they are now."""
        self._wait(1)
        folder, copies = self.folder / "checkpoints", (_frozen(policy), _on_host(state))
        self._pending.append(self._thread.submit(save_checkpoint, folder, *copies, self.keep))

    def save_best(self, policy: TopRLPolicy, row: dict[str, Any]) -> None:
        """``save_best`` of what the policy is now."""
        self._wait(1)
        self._pending.append(self._thread.submit(save_best, self.folder, _frozen(policy), copy.deepcopy(row)))

    def close(self) -> None:
        """Wait until all is written."""
        try:
            self._wait(0)
        finally:
            self._thread.shutdown()

    def _wait(self, allowed: int) -> None:
        """Until no more than ``allowed`` are pending; raises what went wrong with one that is done."""
        while self._pending and (len(self._pending) > allowed or self._pending[0].done()):
            self._pending.pop(0).result()


def _frozen(policy: TopRLPolicy) -> TopRLPolicy:
    return copy.deepcopy(policy).cpu()


def _on_host(value: Any) -> Any:
    """A copy of plain data with its tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_host(one) for one in value)
    return value
