"""Jobs in worker processes; a finished job is never done twice, whichever analysis asks for it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from training.evaluation.records import write_whole
from training.fingerprint import code_facts, digest_of, versions

Job = Callable[[dict[str, Any], Path], dict[str, Any]]


def _one_thread() -> None:
    torch.set_num_threads(1)


def run_job(job: Job, arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Do ``job`` and store what it gives; its output goes to a log beside it."""
    path = path_of(job, arguments, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.process_time()  # of one thread: the wall time on an idle core, whatever else the machine does
    with open(path.with_suffix(".log"), "w") as log, contextlib.redirect_stdout(log):
        result = job(arguments, folder)
    record = {"arguments": arguments, "seconds": time.process_time() - began, "result": result}
    write_whole(path, json.dumps(record))
    return json.loads(json.dumps(record))  # as a reader of the file sees it


def path_of(job: Job, arguments: dict[str, Any], folder: Path) -> Path:
    return folder / "jobs" / f"{job.__name__}-{digest_of(arguments)}.json"


class Lab:
    """Does jobs, at most ``workers`` at once, each on one thread; 0 does them in this process.

    A job is a function at the top level of a module, of its arguments (JSON) and the work folder, that gives JSON. What
    it gave is stored under a digest of its name, its arguments and ``made_with``: the code, the versions of libraries
    and the ``contents`` of the data, which all are added to the arguments.
    """

    def __init__(self, folder: Path, workers: int, contents: dict[str, str] | None = None) -> None:
        self.folder, self.workers = folder, workers
        self.made_with = {"code": code_facts(), **versions(), "contents": contents or {}}
        self.seconds = 0.0  # of the jobs asked for since the last reset, whenever they were done
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, job: Job, arguments: Sequence[dict[str, Any]], what: str) -> list[dict[str, Any]]:
        """The results of ``job`` on each of ``arguments``, in their order."""
        arguments = [{**one, "made_with": self.made_with} for one in arguments]
        records: dict[int, dict[str, Any]] = {}
        missing = []
        for number, one in enumerate(arguments):
            path = path_of(job, one, self.folder)
            if path.is_file():
                records[number] = json.loads(path.read_text())
            else:
                missing.append(number)
        began = time.perf_counter()
        for done, (number, record) in enumerate(self._run(job, arguments, missing), 1):
            records[number] = record
            seconds = time.perf_counter() - began
            print(f"  {what}: {done} of {len(missing)} ({seconds:.0f} s)", flush=True)
        self.seconds += sum(record["seconds"] for record in records.values())
        return [records[number]["result"] for number in range(len(arguments))]

    def _run(
        self, job: Job, arguments: Sequence[dict[str, Any]], missing: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        if not self.workers:
            for number in missing:
                yield number, run_job(job, arguments[number], self.folder)
            return
        if missing and self._pool is None:
            os.environ["OMP_NUM_THREADS"] = "1"  # inherited; a thread pool per process would only get in the way
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_one_thread)
        futures: dict[Future[dict[str, Any]], int] = {}
        for number in missing:
            assert self._pool is not None
            futures[self._pool.submit(run_job, job, arguments[number], self.folder)] = number
        for future in as_completed(futures):
            yield futures[future], future.result()
