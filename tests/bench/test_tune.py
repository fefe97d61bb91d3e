"""Tuning, without a GPU: an injected timer, tiny problems in the interpreter, a pretended device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import tune
from bench.tune import Problem
from toprl_kernels import configs
from toprl_kernels.configs import LaunchConfig

CPU = torch.device("cpu")
KERNEL = "masked_attention_fwd"
PINNED = configs.row(KERNEL, "sm_90", size=64, dtype=torch.float32).config
GOOD, BAD = LaunchConfig(16, 32, 4, 1), LaunchConfig(16, 16, 8, 1)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    configs.forget()
    yield
    configs.forget()


def in_force(kernel: str = KERNEL) -> LaunchConfig:
    return configs.select(kernel, size=64, dtype=torch.float32, device=CPU)


def timer_of(milliseconds: dict[LaunchConfig, float]) -> tune.Timer:
    def timer(call: Callable[[], object]) -> float:
        call()
        return milliseconds.get(in_force(), 10.0)

    return timer


def problem(run: Callable[[], list[Tensor]]) -> Problem:
    return Problem(KERNEL, 64, torch.float32, "test", 5, run)


@pytest.fixture
def two_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tune.CANDIDATES, KERNEL, [BAD, GOOD])


@pytest.mark.usefixtures("two_candidates")
@pytest.mark.parametrize(
    ("times", "expected"),
    [((3.0, 1.0, 2.0), GOOD), ((1.0, 0.99, 0.985), PINNED)],  # noise replaces nothing
)
def test_the_fastest_wins_by_a_margin(times: tuple[float, float, float], expected: LaunchConfig) -> None:
    timer = timer_of(dict(zip((PINNED, GOOD, BAD), times, strict=True)))
    best, rows = tune.tune([problem(lambda: [torch.ones(3)])], CPU, timer, None)
    assert best == {(KERNEL, "32 bit", 64): expected}
    assert [row["ms"] for row in rows if row["pinned"]] == [times[0]] and len(rows) == 3


@pytest.mark.usefixtures("two_candidates")
@pytest.mark.parametrize("wrong", [1.001, torch.nan])
def test_a_wrong_result_aborts(wrong: float) -> None:
    with pytest.raises(tune.WrongResultError, match=r"masked_attention_fwd test with 16,32,4,1,1 is .* away"):
        tune.timed(problem(lambda: [torch.full((3,), wrong if in_force() == GOOD else 1.0)]), CPU, timer_of({}))


@pytest.mark.usefixtures("two_candidates")
def test_a_candidate_that_does_not_fit_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    from triton.runtime.errors import OutOfResources

    def run() -> list[Tensor]:
        if in_force() == GOOD:
            raise OutOfResources(300000, 232448, "shared memory")
        return [torch.ones(3)]

    assert tune.best_of(tune.timed(problem(run), CPU, timer_of({GOOD: 0.0, BAD: 1.0, PINNED: 3.0}))) == BAD
    assert "16,32,4,1,1: does not fit (OutOfResources)" in capsys.readouterr().out


def test_real_candidates_are_launched_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate per kernel on tiny problems: each problem launches its kernel, block sizes change no result."""
    problems = [*tune.attention_problems(CPU, tune.REHEARSAL), *tune.actor_problems(CPU, tune.REHEARSAL)]
    assert {each.kernel for each in problems} == set(tune.CANDIDATES)
    asked: set[str] = set()
    select = configs.select

    def recording(kernel: str, **options: Any) -> LaunchConfig:
        asked.add(kernel)
        return select(kernel, **options)

    monkeypatch.setattr(configs, "select", recording)
    for each in problems:
        asked.clear()
        assert tune.tune([each], CPU, lambda call: 1.0, 1)[0]
        assert each.kernel in asked


def test_a_bucket_keeps_the_worst_point() -> None:
    milliseconds = iter([1.0, 2.0, 3.0, 2.0, 1.0, 4.0])  # triton, eager of three sizes in one bucket

    def timer(call: Callable[[], object]) -> float:
        call()
        return next(milliseconds)

    found = tune.actor_times(CPU, timer, replace(tune.REHEARSAL, actor_tokens=(5, 6, 7), actor_widths=((16, 8),)))
    assert found == {("actor_score", "32 bit", (8, 16, 8)): (3.0, 2.0)}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(configs, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    monkeypatch.delenv(configs.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(tune, "attention_problems", lambda device, sizes: [problem(lambda: [torch.ones(3)])])
    monkeypatch.setattr(tune, "actor_problems", lambda device, sizes: [])
    times = {("actor_score", "32 bit", (8, 16, 8)): configs.Times(3.0, 2.0)}
    monkeypatch.setattr(tune, "actor_times", lambda device, timer, sizes: times)
    monkeypatch.setitem(tune.CANDIDATES, KERNEL, [GOOD])
    return tmp_path / "measured.json"


def timer_on_cuda(call: Callable[[], object]) -> float:
    call()
    return 1.0 if configs._overrides.get(KERNEL) == GOOD else 2.0


def test_rows_are_written_kept_and_replaced(pretended: Path) -> None:
    """``select`` reads them; one kernel keeps the others, unless of another version; a corrupt file stays as it is."""
    cuda = torch.device("cuda", 0)
    assert tune.run(cuda, "", pretended, timer_on_cuda) == pretended
    with tune.using(pretended):
        assert configs.select(KERNEL, size=64, dtype=torch.float32, device=cuda) == GOOD
        assert "1 timings measured on NVIDIA Test" in configs.describe(cuda)
    before = configs.read(pretended, "sm_90", "sm_90")
    tune.run(cuda, "actor_score", pretended, timer_on_cuda)
    assert configs.read(pretended, "sm_90", "sm_90") == before
    pretended.write_text(pretended.read_text().replace(configs.triton_version(), "2.0"))
    tune.run(cuda, "actor_score", pretended, timer_on_cuda)
    assert configs.read(pretended, "sm_90", "sm_90").configs == {}
    pretended.write_text("{")
    with pytest.raises(RuntimeError, match=r"measured.json cannot be read .*delete the file"):
        tune.run(cuda, "actor_score", pretended, timer_on_cuda)
    assert pretended.read_text() == "{"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device, and there is one")
def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "this needs a CUDA device"),
        (["--kernel", "nothing"], "--kernel nothing matches none of masked_attention_fwd"),
    ):
        assert tune.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_candidates_are_possible() -> None:
    for kernel, candidates in tune.CANDIDATES.items():
        assert kernel in configs.KERNELS
        assert len(set(candidates)) == len(candidates) >= 3
