"""The report's arithmetic and command line; what it finds is in test_ahead_of_time.py."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

from toprl_kernels import ahead_of_time, configs, report
from toprl_kernels.ahead_of_time import Case, Resources, Work
from toprl_kernels.bounds import CHIPS, bound, occupancy
from toprl_kernels.configs import LaunchConfig

GOOD = Resources(
    kernel="masked_attention_fwd",
    label="D=128 bf16 soft",
    architecture="sm_90",
    config=LaunchConfig(128, 64, 8, 3),
    registers=200,
    shared_bytes=100_000,
    matrix_instructions=12,
    matrix=True,
    work=Work("test", programs=132, flops=989e12 * 1e-4),
)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"spills": 3, "stack_bytes": 16}, "3 spills, 16 bytes of stack"),
        ({"stack_bytes": 8}, "0 spills, 8 bytes of stack"),
        ({"shared_bytes": 227 * 1024}, None),
        ({"shared_bytes": 227 * 1024 + 1}, "232449 bytes of shared memory, the limit is 232448"),
        ({"matrix_instructions": 0}, "no matrix instruction"),
        ({"matrix_instructions": 0, "matrix": False}, None),
        ({"config": LaunchConfig(128, 64, 64, 3)}, "2048 threads, the limit is 1024"),
        ({"error": "CompilationError: x"}, "does not compile: CompilationError: x"),
    ],
)
def test_problems(changes: dict, problem: str | None) -> None:
    assert report.problems(dataclasses.replace(GOOD, **changes)) == ([] if problem is None else [problem])


def test_a_warp_of_amd_has_64_threads() -> None:
    resources = dataclasses.replace(GOOD, architecture="gfx942", shared_bytes=0, config=LaunchConfig(1, 1, 32, 1))
    assert report.problems(resources) == ["2048 threads, the limit is 1024"]


def test_an_exception_excuses_one_case_only() -> None:
    excused = dataclasses.replace(
        GOOD, kernel="masked_attention_bwd_dkdv", label="D=256 bf16 hard", matrix_instructions=0
    )
    assert report.problems(excused) == []
    assert "64 keys" in str(report.exception(excused))
    assert report.problems(dataclasses.replace(excused, label="D=128 bf16 hard")) == ["no matrix instruction"]
    assert report.problems(dataclasses.replace(excused, spills=1)) == ["1 spills, 0 bytes of stack"]
    assert report.exception(dataclasses.replace(excused, matrix_instructions=4)) is None


@pytest.mark.parametrize(
    ("changes", "programs", "limited_by"),
    [
        ({}, 1, "registers"),  # 200 * 256 of 65536
        ({"registers": 128}, 2, "registers"),
        ({"registers": 129}, 1, "registers"),  # allocated in steps of 8 per thread: 136
        ({"registers": 32}, 2, "shared"),  # 233472 / (100000 + 1024)
        ({"registers": 32, "shared_bytes": 0}, 8, "registers"),
        ({"registers": 16, "shared_bytes": 0}, 8, "warps"),
    ],
)
def test_occupancy(changes: dict, programs: int, limited_by: str) -> None:
    assert occupancy(dataclasses.replace(GOOD, **changes), CHIPS["sm_90"]) == (programs, limited_by)


def test_occupancy_by_tensor_memory() -> None:
    resources = dataclasses.replace(GOOD, registers=32, shared_bytes=0, tensor_memory=512)
    assert occupancy(resources, CHIPS["sm_100"]) == (1, "tensor memory")


def test_bound_is_the_slowest_resource() -> None:
    def estimate(**work: float) -> tuple[str, float]:
        got = bound(dataclasses.replace(GOOD, work=Work("test", programs=132, **work)))  # type: ignore[arg-type]
        assert got is not None
        return got.resource, got.microseconds

    assert estimate(flops=989e12 * 1e-4) == ("matrix", pytest.approx(100))
    assert estimate(flops=67e12 * 1e-4, single=True) == ("matrix", pytest.approx(100))
    assert estimate(flops=989e12 * 1e-4, dram_bytes=3.35e12 * 2e-4) == ("memory", pytest.approx(200))
    assert estimate(exps=16 * 132 * 1.83e9 * 1e-4) == ("special", pytest.approx(100))
    assert estimate(l2_bytes=5120 / 108 * 132 * 1.83e9 * 1e-4) == ("L2", pytest.approx(100))


def test_idle_multiprocessors_cost_time() -> None:
    """133 programs on 132 multiprocessors: one of them does two."""
    assert GOOD.work is not None
    uneven = bound(dataclasses.replace(GOOD, work=dataclasses.replace(GOOD.work, programs=133)))
    assert uneven is not None
    assert uneven.microseconds == pytest.approx(100 * 2 * 132 / 133)


def test_no_estimate_without_figures() -> None:
    assert bound(dataclasses.replace(GOOD, architecture="gfx942")) is None
    assert bound(dataclasses.replace(GOOD, work=None)) is None
    assert bound(dataclasses.replace(GOOD, error="x")) is None


def test_every_nvidia_architecture_has_figures() -> None:
    assert set(CHIPS) == {name for name in configs.ARCHITECTURES if name.startswith("sm_")}
    for architecture, chip in CHIPS.items():
        assert chip.shared_memory == configs.SHARED_MEMORY[architecture] + 1024


def select(kernel: str, size: int, dtype: object) -> LaunchConfig:
    return configs.pinned(kernel, "sm_90", size=size, dtype=dtype)  # type: ignore[arg-type]


def test_cases_are_distinct_and_complete() -> None:
    """Each launch constant is given, so that a new one cannot be forgotten; labels name one case each."""
    cases = ahead_of_time.all_cases(select, extended=True)
    assert len({(case.kernel, case.label) for case in cases}) == len(cases) >= 140
    short = ahead_of_time.all_cases(select)
    assert {case.kernel for case in short} == set(configs.KERNELS)
    assert len(short) < len(cases)


def test_a_missing_constant_is_named() -> None:
    from toprl_kernels.actor import triton as kernels

    case = Case("actor_layer1", "x", fake_jit(kernels.actor_layer1_kernel), {"_": "bf16"}, {}, LaunchConfig(1, 1, 1, 1))
    with pytest.raises(ValueError, match="actor_layer1 x: the case gives no value for the kernel's constant HALF"):
        ahead_of_time.specialize(case)


def fake_jit(kernel: object) -> object:
    """The compilable form of a kernel that this process interprets."""
    from triton.runtime.jit import JITFunction

    return JITFunction(kernel.fn)  # type: ignore[attr-defined]


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--arch", "75"], "'75' is unknown; use one of sm_80"),
        (["--config", "nothing=1,2,3,4"], "'nothing' is unknown"),
        (["--config", "keep_mask=1,2"], "is not KERNEL=M,N,WARPS,STAGES"),
    ):
        with pytest.raises(SystemExit):
            report.main(arguments)
        assert message in capsys.readouterr().err


def test_needs_a_compiling_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert report.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
