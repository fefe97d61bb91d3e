"""The pinned table, its lookup per device, and the file of measurements that may replace rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import tune
from toprl_kernels import configs
from toprl_kernels.configs import LaunchConfig, Measurements, Times

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ROW = ("masked_attention_fwd", "16 bit", 128)
TIME = ("actor_score", "16 bit", (4096, 4096, 256))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    configs.forget()
    yield
    configs.forget()


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """CUDA devices answer as capability 9.0; returns where measurements are looked for."""
    monkeypatch.setattr(configs, "capability_of", lambda device: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(configs.ENVIRONMENT_VARIABLE, raising=False)
    configs.forget()
    return configs.measurements_path("sm_90")


def forward(device: torch.device, size: int = 128, dtype: torch.dtype = torch.bfloat16) -> LaunchConfig:
    return configs.select("masked_attention_fwd", size=size, dtype=dtype, device=device)


def measurements() -> Measurements:
    return Measurements("NVIDIA Test", {ROW: LaunchConfig(16, 16, 1, 1)}, {TIME: Times(1.0, 2.0)})


# --- the table ---


def test_every_kernel_has_rows_for_every_architecture_and_type() -> None:
    for kernel in configs.KERNELS:
        for architecture in configs.ARCHITECTURES:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                assert configs.row(kernel, architecture, size=16, dtype=dtype).config
    for config in (config for name in configs.ARCHITECTURES for config in configs.all_rows(name).values()):
        assert config.num_warps in (1, 2, 4, 8, 16, 32)
        assert config.num_stages >= 1 and config.splits in (0, 1, 2, 4)
        for block in (config.block_m, config.block_n):
            assert block & (block - 1) == 0  # a power of two, or 0


def test_lookup() -> None:
    """CPU tensors get the rows of sm_90, or of the architecture that they stand for; 16-bit types share rows."""
    pinned = configs.row("masked_attention_fwd", "sm_90", size=128, dtype=torch.bfloat16)
    assert forward(CPU) == pinned.config == forward(CPU, dtype=torch.float16) != forward(CPU, dtype=torch.float32)
    assert forward(CPU, 80) == forward(CPU, 96) == forward(CPU, 128) != forward(CPU, 129)
    assert configs.row("masked_attention_fwd", "sm_90", size=129, dtype=torch.float16)[:2] == ("16 bit", 256)
    with configs.cpu_stands_for("sm_86"):
        other = configs.row("masked_attention_fwd", "sm_86", size=128, dtype=torch.bfloat16).config
        assert forward(CPU) == other != pinned.config
    assert forward(CPU) == pinned.config


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_80"), ((8, 9), "sm_86"), ((9, 0), "sm_90"),
        ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((11, 0), "sm_100"), ((12, 0), "sm_86"), ((13, 0), "sm_86"),
    ],
)  # fmt: skip
def test_architectures(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architecture: str) -> None:
    monkeypatch.setattr(configs, "capability_of", lambda device: capability)
    assert configs.architecture_of(CUDA) == architecture


def test_too_old_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "capability_of", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"capability 7.5 is too old.*use backend='eager'"):
        configs.architecture_of(CUDA)


@pytest.mark.parametrize(
    ("kernel", "size", "dtype", "message"),
    [
        ("nothing", 64, torch.float32, r"kernel='nothing' is unknown; use one of masked_attention_fwd"),
        ("masked_attention_fwd", 513, torch.float32, r"no row for size=513, the largest is 512; use backend='eager'"),
        ("masked_attention_fwd", 64, torch.float64, r"no row for dtype=torch.float64; use float16"),
    ],
)
def test_lookup_errors(kernel: str, size: int, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configs.select(kernel, size=size, dtype=dtype, device=CPU)


def test_override_is_undone() -> None:
    before, other = forward(CPU), LaunchConfig(16, 16, 1, 1)
    with configs.override({"masked_attention_fwd": other}):
        assert forward(CPU) == other
        with configs.override({"masked_attention_bwd_dq": other}):
            assert forward(CPU) == other
    assert forward(CPU) == before


# --- measurements ---


def test_a_file_replaces_its_rows_only(h100: Path) -> None:
    pinned = forward(CUDA)
    tune.write(h100, "sm_90", measurements())
    assert forward(CUDA) == LaunchConfig(16, 16, 1, 1) != pinned
    assert forward(CUDA, 256) == forward(CPU, 256)
    assert forward(CUDA, dtype=torch.float32) == forward(CPU, dtype=torch.float32)
    assert forward(CPU) == pinned  # the interpreter never uses a GPU's measurements


def test_a_failed_write_keeps_the_old_file(h100: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is read again, and no part of a file stays."""
    tune.write(h100, "sm_90", measurements())

    def fail(*arguments: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tune.write(h100, "sm_90", Measurements("other", {}, {}))
    assert configs.read(h100, "sm_90", "sm_90") == measurements()
    assert [path.name for path in h100.parent.iterdir()] == [h100.name]


def edited(**changes: object) -> str:
    content = {
        "format": 1, "architecture": "sm_90", "triton": configs.triton_version(), "device": "x", "configs": [],
        "times": [],
    }  # fmt: skip
    return json.dumps(content | changes)


def store(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "AttributeError"),
        (edited(configs=[{"kernel": "masked_attention_fwd"}]), r"KeyError: 'dtype'"),
        (edited(times=3), "TypeError"),
    ],
)
def test_a_corrupt_file_is_an_error_that_names_it(h100: Path, text: str, message: str) -> None:
    store(h100, text)
    with pytest.raises(RuntimeError, match=message) as raised:
        forward(CUDA)
    assert str(h100) in str(raised.value)
    assert "delete the file or run python bench/tune.py again" in str(raised.value)
    assert str(h100) in configs.describe(CUDA)  # which reports it instead of raising


OLD_ROW = {"kernel": "old_kernel", "dtype": "16 bit", "size": 128, "config": [16, 16, 1, 1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edited(format=0), "its format is 0, not 1"),
        (edited(architecture="sm_80"), "its architecture is 'sm_80', not 'sm_90'"),
        (edited(triton="2.0"), "its triton is '2.0', not"),
        (edited(configs=[OLD_ROW]), "no row .'old_kernel', '16 bit', 128. in this package"),
    ],
)
def test_a_file_of_another_version_warns_once_and_is_not_used(h100: Path, text: str, message: str) -> None:
    store(h100, text)
    with pytest.warns(UserWarning, match=message) as told:
        found = [forward(CUDA), forward(CUDA, 64), configs.faster("actor_score", (1, 1, 1), torch.float32, CUDA)]
    assert found == [forward(CPU), forward(CPU, 64), None]
    assert len(told) == 1 and str(h100) in str(told[0].message)
    assert "pinned for sm_90" in configs.describe(CUDA)


def test_a_named_file_must_exist(h100: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(configs.ENVIRONMENT_VARIABLE, str(tmp_path / "missing.json"))
    with pytest.raises(RuntimeError, match=r"missing.json cannot be read .FileNotFoundError"):
        forward(CUDA)


def test_the_variable_names_another_file(h100: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "other.json"
    tune.write(other, "sm_90", measurements())
    pinned = forward(CUDA)
    with tune.using(other):
        assert forward(CUDA) == LaunchConfig(16, 16, 1, 1)
    assert forward(CUDA) == pinned and not h100.exists()
    assert configs.ENVIRONMENT_VARIABLE not in os.environ


# --- which implementation ---


@pytest.mark.parametrize(
    ("sizes", "dtype", "name"),
    [
        ((2880, 4096, 256), torch.bfloat16, "triton"),
        ((4096, 4000, 255), torch.float16, "triton"),  # the same bucket
        ((4097, 4096, 256), torch.bfloat16, None),
        ((2880, 2048, 256), torch.bfloat16, None),
        ((2880, 4096, 256), torch.float32, None),
        ((2880, 4096, 256), torch.float64, None),
    ],
)
def test_a_timing_speaks_for_its_bucket(
    h100: Path, sizes: tuple[int, ...], dtype: torch.dtype, name: str | None
) -> None:
    assert configs.faster("actor_score", sizes, dtype, CUDA) is None  # nobody has measured
    tune.write(h100, "sm_90", measurements())
    assert configs.faster("actor_score", sizes, dtype, CUDA) == name
    assert configs.faster("actor_score", sizes, dtype, CPU) is None


def test_the_slower_one_is_not_taken(h100: Path) -> None:
    tune.write(h100, "sm_90", Measurements("x", {}, {TIME: Times(2.0, 1.0)}))
    assert configs.faster("actor_score", (2880, 4096, 256), torch.bfloat16, CUDA) == "eager"


def test_description(h100: Path) -> None:
    assert "pinned (there are measurements for GPUs only)" in configs.describe(CPU)
    assert "pinned for sm_90; python bench/tune.py measures them" in configs.describe(CUDA)
    tune.write(h100, "sm_90", measurements())
    text = configs.describe(CUDA)
    assert "1 of " in text and "1 timings measured on NVIDIA Test" in text and str(h100) in text
