"""How a training process starts and ends: torchrun's process group, SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch

from training.trainer.ranks import Ranks


class Terminated(SystemExit):
    """SIGTERM came: ends the process with 128 + 15, as a shell reports it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within, SIGTERM raises ``Terminated`` in the main thread, so that ``finally`` and ``except`` clauses run."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def device_name(device: str) -> str:
    """Pick CUDA where ``device`` is "" and there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def torchrun_ranks(device: str, timeout: float) -> Iterator[tuple[Ranks, str]]:
    """This process's rank and device under torchrun; rank 0 of 1 without it.

    Args:
        device: "" picks CUDA where there is one. Under torchrun each process of a machine takes its own GPU.
        timeout: seconds that a collective waits for the other processes.

    Raises:
        ValueError: ``device`` names one GPU for several processes, or there are fewer GPUs than processes.
    """
    device = device_name(device)
    if "RANK" not in os.environ:
        yield Ranks(), device
        return
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.startswith("cuda"):
        if device != "cuda":
            raise ValueError(f"--device {device} is one GPU for all processes of torchrun; use --device cuda")
        if local >= count:
            raise ValueError(f"torchrun started process {local + 1} of this machine, which has {count} GPUs")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    yield ranks, device
    # not in a finally clause: behind an error the others may never come, and the process ends anyway
    torch.distributed.destroy_process_group()
