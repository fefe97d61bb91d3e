"""Tuning, without a GPU: an injected timer, tiny problems in the interpreter, a pretended device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from toprl_kernels import configs, tune
from toprl_kernels.configs import LaunchConfig
from toprl_kernels.tune import Problem

CPU = torch.device("cpu")
KERNEL = "masked_attention_fwd"
PINNED = configs.pinned(KERNEL, "sm_90", size=64, dtype=torch.float32)
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
    return Problem(KERNEL, 64, torch.float32, "test", run)


@pytest.fixture
def two_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tune.CANDIDATES, KERNEL, [BAD, GOOD])


@pytest.mark.usefixtures("two_candidates")
def test_the_fastest_wins() -> None:
    timer = timer_of({PINNED: 3.0, GOOD: 1.0, BAD: 2.0})
    assert tune.best_config(problem(lambda: [torch.ones(3)]), CPU, timer) == (GOOD, 1.0, 3.0)


@pytest.mark.usefixtures("two_candidates")
def test_noise_does_not_replace_the_pinned_configuration() -> None:
    timer = timer_of({PINNED: 1.0, GOOD: 0.99, BAD: 0.985})
    assert tune.best_config(problem(lambda: [torch.ones(3)]), CPU, timer) == (PINNED, 1.0, 1.0)


@pytest.mark.usefixtures("two_candidates")
def test_a_wrong_result_aborts() -> None:
    def run() -> list[Tensor]:
        return [torch.ones(3) * (1.001 if in_force() == GOOD else 1.0)]

    with pytest.raises(tune.WrongResultError, match=r"masked_attention_fwd test with 16,32,4,1,1 is 1.00e-03 away"):
        tune.best_config(problem(run), CPU, timer_of({}))


@pytest.mark.usefixtures("two_candidates")
def test_nan_is_a_wrong_result() -> None:
    def run() -> list[Tensor]:
        return [torch.full((3,), torch.nan if in_force() == GOOD else 1.0)]

    with pytest.raises(tune.WrongResultError):
        tune.best_config(problem(run), CPU, timer_of({}))


@pytest.mark.usefixtures("two_candidates")
def test_a_candidate_that_does_not_fit_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    from triton.runtime.errors import OutOfResources

    def run() -> list[Tensor]:
        if in_force() == GOOD:
            raise OutOfResources(300000, 232448, "shared memory")
        return [torch.ones(3)]

    assert tune.best_config(problem(run), CPU, timer_of({GOOD: 0.0, BAD: 1.0, PINNED: 3.0}))[0] == BAD
    assert "16,32,4,1,1: does not fit (OutOfResources)" in capsys.readouterr().out


def test_every_kernel_with_candidates_reacts_to_them() -> None:
    """The problem of a kernel must launch it with the configuration under test, or its timings say nothing."""
    small: list[Problem] = [
        *tune.attention_problems(CPU, tokens=20, heads=(2, 1), head_dims=(16,), dtypes=(torch.float32,)),
        *tune.actor_problems(CPU, tokens=(20,), widths=(32, 16), dtypes=(torch.float32,)),
    ]
    assert {each.kernel for each in small} == set(tune.CANDIDATES)
    asked: list[str] = []
    select = configs.select

    def recording(kernel: str, **options: object) -> LaunchConfig:
        asked.append(kernel)
        return select(kernel, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        for module in ("masked_attention.triton", "actor_score.triton"):
            launcher = __import__(f"toprl_kernels.{module}", fromlist=["triton"])
            patch.setattr(launcher if hasattr(launcher, "select") else configs, "select", recording)
        for each in small:
            asked.clear()
            each.run()
            assert each.kernel in asked


def test_real_candidates_agree() -> None:
    """Two candidates per kernel, run for real on tiny problems: block sizes must not change the result."""
    problems = [
        *tune.attention_problems(CPU, tokens=40, heads=(2, 1), head_dims=(16,), dtypes=(torch.float32,)),
        *tune.actor_problems(CPU, tokens=(40,), widths=(48, 16), dtypes=(torch.float32,)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for kernel, candidates in list(tune.CANDIDATES.items()):
            patch.setitem(tune.CANDIDATES, kernel, candidates[-2:])
        rows = tune.tune(problems, CPU, timer_of({}))
    assert len(rows) == len(tune.CANDIDATES)


def test_a_bucket_keeps_the_worst_point() -> None:
    milliseconds = iter([1.0, 2.0, 3.0, 2.0, 1.0, 4.0])  # triton, eager of three sizes in one bucket

    def timer(call: Callable[[], object]) -> float:
        call()
        return next(milliseconds)

    found = tune.actor_times(CPU, timer, tokens=(5, 6, 7), widths=((16, 8),), dtypes=(torch.float32,))
    assert found == {("actor_score", "32 bit", (8, 16, 8)): (3.0, 2.0)}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(configs, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    monkeypatch.delenv(configs.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(tune, "attention_problems", lambda device: [problem(lambda: [torch.ones(3)])])
    monkeypatch.setattr(tune, "actor_problems", lambda device: [])
    times = {("actor_score", "32 bit", (8, 16, 8)): configs.Times(3.0, 2.0)}
    monkeypatch.setattr(tune, "actor_times", lambda device, timer: times)
    monkeypatch.setitem(tune.CANDIDATES, KERNEL, [GOOD])
    return tmp_path / "measured.json"


def timer_on_cuda(call: Callable[[], object]) -> float:
    call()
    return 1.0 if configs._overrides.get(KERNEL) == GOOD else 2.0


def test_run_writes_what_select_reads(pretended: Path) -> None:
    cuda = torch.device("cuda", 0)
    assert tune.run(cuda, "", pretended, timer_on_cuda) == pretended
    with configs.using(pretended):
        assert configs.select(KERNEL, size=64, dtype=torch.float32, device=cuda) == GOOD
        assert "1 timings measured on NVIDIA Test" in configs.describe(cuda)


def test_one_kernel_keeps_the_other_rows(pretended: Path) -> None:
    cuda = torch.device("cuda", 0)
    tune.run(cuda, "", pretended, timer_on_cuda)
    before = configs.read(pretended, "sm_90", "sm_90")
    tune.run(cuda, "actor_score", pretended, timer_on_cuda)
    assert configs.read(pretended, "sm_90", "sm_90") == before


def test_one_kernel_into_a_corrupt_file_is_an_error(pretended: Path) -> None:
    pretended.write_text("{")
    with pytest.raises(RuntimeError, match=r"measured.json cannot be used.*delete the file"):
        tune.run(torch.device("cuda", 0), "actor_score", pretended, timer_on_cuda)
    assert pretended.read_text() == "{"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device, and there is one")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "this needs a CUDA device" in capsys.readouterr().err


def test_unknown_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--kernel", "nothing"]) == 2
    assert "--kernel nothing is in none of masked_attention_fwd" in capsys.readouterr().err


def test_candidates_are_possible() -> None:
    for kernel, candidates in tune.CANDIDATES.items():
        assert kernel in configs.KERNELS
        assert len(set(candidates)) == len(candidates) >= 3
