"""Training runs in processes of their own that can be killed.

Started as a script it imports the trainer and reads the scenes' images once and then forks a process per request,
because both take longer than the training that the tests do. It runs no model itself: a fork of a process with running
threads may hang.

A request is a line of JSON on stdin and its answer one on stdout. {"log": file, "processes": [{"config": flags,
"environment": variables, "signal": {"signal": number, "iteration": i, "calls": n}}]} is answered by their ids, and
{"wait": ids} by their exit codes, or minus the signal that ended them. "signal" may be left out. With it the process
signals itself after n calls of Python functions in its main thread from the start of iteration i: a moment that is
drawn by the test, and the same one however fast the machine is. An odd iteration starts when all checkpoints due before
it are on disk; in an even one they may still be in the making.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Runner:
    """Starts training processes; a context manager."""

    def __enter__(self) -> Runner:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def start(self, log: Path, *processes: dict[str, Any]) -> list[int]:
        """Start processes together; their output goes to ``log``. Returns their ids."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps({"log": str(log), "processes": processes}) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def wait(self, *pids: int) -> list[int]:
        """Exit codes; minus the signal where one ended the process."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps({"wait": pids}) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def _signal_itself(signal: int, iteration: int, calls: int) -> None:
    """Arrange for a signal in the middle of an iteration."""
    from training.ppo import Trainer

    iterate, left = Trainer.iterate, calls

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        left -= event == "call"
        if left < 0:
            sys.setprofile(None)
            os.kill(os.getpid(), signal)

    def counted(trainer: Trainer) -> dict[str, Any]:
        if trainer.iteration == iteration:
            if iteration % 2 and trainer.ranks.first:
                trainer.writer._wait(0)
            sys.setprofile(count)
        return iterate(trainer)

    Trainer.iterate = counted  # type: ignore[method-assign]


def _child(log: str, process: dict[str, Any]) -> None:
    """The forked process: train and leave without running the parent's clean-up."""
    output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(process["environment"])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 1
    try:
        from training.ppo import PPOConfig, main

        if "signal" in process:
            _signal_itself(**process["signal"])
        main(PPOConfig(**process["config"]))
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import torch.utils.tensorboard  # noqa: F401 slow to import, and each process needs it
    import transformers.models.llava.modeling_llava  # noqa: F401

    import training.ppo  # noqa: F401
    from training.scenes import load_sources

    load_sources("train")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in request["wait"]]
        else:
            answer = []
            for process in request["processes"]:
                pid = os.fork()
                if not pid:
                    _child(request["log"], process)
                answer.append(pid)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
