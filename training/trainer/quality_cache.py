"""What is measured once per sample and kept on disk: the unpruned model's Q, hours of work for a large model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from training.fingerprint import differences, digest_of
from training.trainer.ranks import Ranks


def measure_once(
    column: str,
    path: Path | None,
    identity: dict[str, Any],
    total: int,
    batch_size: int,
    measure: Callable[[list[int]], Tensor],
    ranks: Ranks,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A number for each of ``total`` samples, float32 ``[total]``, from ``path`` as far as it is there.

    The file is replaced as a whole after every round of batches (one per process), so that a killed pass goes on where
    it was. Batches are the same whatever is known already and however many processes share them.

    Args:
        column: what is measured, for the progress bar.
        path: the file; None keeps nothing. Only the first process reads and writes it.
        identity: what the numbers depend on, a part of the file.
        measure: gives the numbers of the samples of these indices, float32 ``[n]`` on the CPU.
        device: on which processes exchange numbers (nccl knows no other than the GPU).

    Raises:
        ValueError: the file is corrupt or of something else; the message names it and the fix.
    """
    from rich.progress import Progress

    known = torch.zeros(0)
    if path is not None and ranks.first:
        known = read_column(path, identity, total)
    done = int(ranks.sum(torch.tensor(len(known), device=device)))
    values = ranks.sum(pad(known, (0, done - len(known))).to(device)).cpu()
    with Progress(disable=not ranks.first or done == total, transient=True) as progress:
        bar = progress.add_task(f"unpruned model: {column}", total=total, completed=done)
        while done < total:
            firsts = range(done, total, batch_size)[: ranks.size]
            own = [list(range(first, min(first + batch_size, total))) for first in firsts[ranks.share(len(firsts))]]
            parts = [pad(part, (0, batch_size - len(part))) for part in map(measure, own)]
            mine = torch.stack(parts) if parts else torch.zeros(0, batch_size)
            found = ranks.gather(mine.to(device), len(firsts)).cpu()
            values = torch.cat([values, found.flatten()])[:total]
            done = len(values)
            if path is not None and ranks.first:
                write_column(path, identity, values)
            progress.update(bar, completed=done)
    return values


def column_path(folder: Path, column: str, identity: dict[str, Any]) -> Path:
    """The file of one column of numbers; another model, other data or other settings are another file."""
    return folder / f"{column}-{digest_of(identity)}.safetensors"


def read_column(path: Path, identity: dict[str, Any], total: int) -> Tensor:
    """The numbers known so far, float32 ``[n]`` with n <= ``total``; none where there is no file.

    Raises:
        ValueError: the file is corrupt or of something else.
    """
    if not path.is_file():
        return torch.zeros(0)
    try:
        with safe_open(path, "pt") as file:
            values, found = file.get_tensor("values"), json.loads(file.metadata()["identity"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--cache_dir: {path} is corrupt ({error}); delete it, and it is measured again") from error
    if found != identity:
        changed = "; ".join(differences(found, identity))
        raise ValueError(f"--cache_dir: {path} holds numbers of something else ({changed}); delete it or rename it")
    if values.dtype != torch.float32 or values.ndim != 1 or len(values) > total or not values.isfinite().all():
        shape = f"{values.dtype} {tuple(values.shape)}"
        raise ValueError(f"--cache_dir: {path} is corrupt ({shape}, not finite float32 [{total}]); delete it")
    return values


def write_column(path: Path, identity: dict[str, Any], values: Tensor) -> None:
    """Write aside, then rename: a reader sees the old file or the new one, two writers do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file({"values": values}, aside, {"identity": json.dumps(identity)})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
