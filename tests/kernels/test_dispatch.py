"""The choice of implementation, its errors, and life without triton."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
import textwrap

import pytest
import torch

from bench.compile_report import kernel_modules
from toprl_kernels import actor_score, dispatch, explain, masked_attention, sample_keep_mask, topk_compact
from toprl_kernels.testing import make_actor_weights, make_attention_inputs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about the process without a CUDA device")


@needs_no_cuda
def test_this_process_interprets_the_kernels() -> None:
    """Otherwise every 'triton' test here could silently be testing something else."""
    kernels = {
        name: value for module in kernel_modules() for name, value in vars(module).items() if name.endswith("_kernel")
    }
    assert len(kernels) >= 12
    assert {type(kernel).__name__ for kernel in kernels.values()} == {"InterpretedFunction"}


def test_automatic_choice() -> None:
    assert dispatch.choose("op", None, CPU).name == "eager"
    assert dispatch.choose("op", "auto", CPU).name == "eager"
    assert dispatch.choose("op", None, CUDA).name == "triton"
    declined = dispatch.choose("op", None, CUDA, "float64")
    assert declined.name == "eager"
    assert "float64" in declined.reason


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPRL_KERNELS_BACKEND", "eager")
    assert dispatch.choose("op", None, CUDA).name == "eager"
    assert dispatch.choose("op", "reference", CUDA).name == "reference"
    assert dispatch.choose("op", "auto", CUDA).name == "triton"  # an argument is stronger than the variable
    monkeypatch.setenv("TOPRL_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="backend='fast' from the environment variable TOPRL_KERNELS_BACKEND"):
        dispatch.choose("op", None, CPU)
    assert "error" in explain("cpu")


def test_triton_without_cuda_or_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = make_attention_inputs(1, 1, 1, 4, 4, 8)
    with pytest.raises(RuntimeError, match=r"masked_attention: backend='triton'.*on cpu.*TRITON_INTERPRET=1"):
        masked_attention(*x[:4], backend="triton")
    monkeypatch.setenv("TOPRL_KERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"topk_compact: backend='triton' from the environment variable"):
        topk_compact(torch.zeros(1, 2, 1), torch.zeros(1, 2), 1)


@needs_no_cuda
def test_triton_refuses_what_it_cannot_do() -> None:
    x = make_attention_inputs(1, 1, 1, 4, 4, 8)
    with pytest.raises(RuntimeError, match=r"query has dtype float64.*16 and 32 bit"):
        masked_attention(*(tensor.double() for tensor in x[:4]), backend="triton")
    wide = make_attention_inputs(1, 1, 1, 4, 4, 520)
    with pytest.raises(RuntimeError, match=r"D=520.*at most 512"):
        masked_attention(*wide[:4], backend="triton")
    with pytest.raises(RuntimeError, match=r"scores has dtype float64"):
        topk_compact(torch.zeros(1, 2, 1), torch.zeros(1, 2).double(), 1, backend="triton")
    with pytest.raises(RuntimeError, match=r"N=1048577.*N <= 1048576"):
        topk_compact(torch.zeros(1, 2**20 + 1, 1), torch.zeros(1, 2**20 + 1), 1, backend="triton")
    with pytest.raises(RuntimeError, match=r"hidden_states has dtype float64"):
        actor_score(torch.zeros(1, 2, 4).double(), 0, make_actor_weights(4, 2), backend="triton")
    with pytest.raises(RuntimeError, match=r"logits has dtype float64"):
        sample_keep_mask(torch.zeros(1, 2, 2).double(), backend="triton")


def test_explain_names_every_op() -> None:
    lines = explain("cpu").splitlines()
    assert [line.split(":")[0] for line in lines] == [*dispatch.OPS, "launch configurations"]
    assert all("eager (the tensors are on cpu" in line for line in lines[:-1])
    assert "triton (CUDA tensors)" in explain("cuda")


def run_fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_does_not_load_triton() -> None:
    out = run_fresh(
        """
        import sys
        import torch
        before = {name for name in sys.modules if name.split(".")[0] == "triton"}
        import toprl_kernels
        print(sorted({name for name in sys.modules if name.split(".")[0] == "triton"} - before))
        """
    )
    assert out.strip() == "[]"


@pytest.mark.slow
def test_works_without_triton() -> None:
    out = run_fresh(
        """
        import importlib.abc, sys

        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Block())
        import torch
        from toprl_kernels import actor_score, explain, flops, masked_attention, sample_keep_mask, topk_compact
        from toprl_kernels.testing import make_actor_weights, make_attention_inputs

        x = make_attention_inputs(1, 2, 1, 5, 5, 8)
        masked_attention(*x[:4])
        topk_compact(torch.zeros(1, 4, 2), torch.zeros(1, 4), 2)
        sample_keep_mask(actor_score(torch.zeros(1, 4, 6), 0, make_actor_weights(6, 4)))
        assert "eager" in explain("cuda") and "not installed" in explain("cuda")
        try:
            masked_attention(*x[:4], backend="triton")
        except RuntimeError as error:
            print(error)
        """
    )
    assert "backend='triton'" in out
    assert "triton is not installed" in out


@pytest.mark.parametrize("module", ["attention", "topk", "actor", "keep_mask", "cache", "stage"])
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"toprl_kernels.{module}.api"))
    assert result.attempted > 0
    assert result.failed == 0
