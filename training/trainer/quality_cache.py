"""What is measured once per sample and kept on disk: the unpruned model's Q, hours of work for a large model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from training.tasks import Sample, Task, encode
from training.trainer.ranks import Ranks

SAMPLED = 64  # weights of each parameter that go into the fingerprint of a model


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
    return folder / f"{column}-{digest_of(identity)[:16]}.safetensors"


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
        names = sorted(name for name in {*found, *identity} if found.get(name) != identity.get(name))
        raise ValueError(f"--cache_dir: {path} holds numbers of another {', '.join(names)}; delete it or rename it")
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


def identity_of(
    model: Any, processor: Any, task: Task, samples: list[Sample], batch_size: int, column: str
) -> dict[str, Any]:
    """All that the unpruned model's answers to ``samples`` depend on, as JSON data.

    ``batch_size`` is one of them: other batch mates are another rounding, and runs that are to be bitwise equal must
    not depend on who filled the cache.
    """
    identity = {
        "column": column,
        "model": {
            "name": model.config._name_or_path,
            "config": digest_of(model.config.to_dict()),
            "weights": weights_digest(model),
            "dtype": str(model.dtype),
            "attention": model.config.get_text_config()._attn_implementation,
            "device": model.device.type,
        },
        "data": {**task.describe(), "content": samples_digest(processor, task, samples)},
        "generation": {
            "max_new_tokens": task.max_new_tokens,
            "config": model.generation_config.to_diff_dict(),
            "batch_size": batch_size,
        },
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }
    return json.loads(json.dumps(identity, default=str))  # as it comes back from a file


def digest_of(value: Any) -> str:
    """Hexadecimal digest of JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(model: Any) -> str:
    """Digest of names, shapes and 64 evenly spread values of every parameter and buffer: training changes them all.

    Of weights that are offloaded (on "meta"), names and shapes alone.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().flatten()
            digest.update(_bytes(flat[:: max(1, len(flat) // SAMPLED)]))
    return digest.hexdigest()


def samples_digest(processor: Any, task: Task, samples: list[Sample]) -> str:
    """Digest of what is shown, asked and compared with, and of what the processor makes of the first sample."""
    digest = hashlib.sha256()
    for sample in samples:
        text = [sample.key, task.text(sample), sample.answer, sample.answers, sample.choices, sample.bbox]
        digest.update(json.dumps([*text, sample.info], sort_keys=True, default=str).encode())
        for picture in sample.video or sample.all_images:
            digest.update(f"{picture.mode} {picture.size}".encode() + picture.tobytes())
    for name, value in sorted(encode(processor, task, samples[:1], "cpu").items()):
        digest.update(name.encode() + (_bytes(value) if isinstance(value, Tensor) else str(value).encode()))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()
