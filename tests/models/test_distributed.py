"""Tensor parallelism and FSDP2 with two processes on the CPU give what one process does; a decoder on two GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import distributed_run
from tests.models.agreement import ATOL, MIXED, generate, schedule_of
from tests.models.distributed_run import FAMILIES, POLICIES, TENSOR_PARALLEL, gradient_norm, measure
from tests.models.tiny_families import FAMILY_NAMES, build_inputs, build_model
from toprl_models import FastV, attach

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
families = pytest.mark.parametrize("family", FAMILIES)


def run_processes(kind: str, folder: Path) -> list[dict[str, Any]]:
    """Start both processes; what each measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    ended = subprocess.run(
        [*command, str(Path(distributed_run.__file__)), kind, str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    return [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tp")
    for family in FAMILIES:
        build_model(family).save_pretrained(folder / family)
    return run_processes("tp", folder)


@pytest.fixture(scope="module")
def fully_sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes("fsdp", tmp_path_factory.mktemp("fsdp"))


def assert_alike(name: str, measured: dict[str, Any], expected: dict[str, Any]) -> None:
    # logits of a policy that reads logarithms of attention: rounding of small weights is larger there
    tolerance = 1e-4 if name.startswith("toprl, text") else 1e-5
    for indices, scores, their_indices, their_scores in zip(
        *(part[key] for part in (measured, expected) for key in ("indices", "scores")), strict=True
    ):
        assert torch.equal(indices, their_indices)
        torch.testing.assert_close(scores, their_scores, atol=tolerance, rtol=1e-5)
    torch.testing.assert_close(measured["logits"], expected["logits"], atol=ATOL, rtol=1e-4)
    assert torch.equal(measured["answer"], expected["answer"])


@pytest.mark.slow
@families
@pytest.mark.parametrize("name", list(TENSOR_PARALLEL))
def test_tensor_parallel(family: str, name: str, tensor_parallel: list[dict[str, Any]]) -> None:
    expected = measure(build_model(family), family, name)
    for rank in tensor_parallel:
        assert RANKS * rank[family]["local"] == rank[family]["whole"]
        assert_alike(name, rank[family][name], expected)


@pytest.mark.slow
@families
@pytest.mark.parametrize("name", list(POLICIES))
def test_fsdp2(family: str, name: str, fully_sharded: list[dict[str, Any]]) -> None:
    """Sharded before ``attach``, and after it."""
    expected = measure(build_model(family), family, name)
    for rank in fully_sharded:
        assert RANKS * rank[family]["local"] == rank[family]["whole"]
        assert_alike(name, rank[family][name], expected)
        assert_alike(name, rank[family][f"{name}, sharded later"], expected)


@pytest.mark.slow
def test_gradients_in_fsdp2(fully_sharded: list[dict[str, Any]]) -> None:
    """Both ranks have the same rows, so that the mean of their gradients is that of one process."""
    expected = [gradient_norm(build_model("llava"), prune) for prune in (False, True)]
    assert abs(expected[0] - expected[1]) > 1e-2 * expected[0]
    for rank in fully_sharded:
        assert rank["gradient norm"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices, one for each half of the decoder")
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_decoder_on_two_gpus(family: str, tmp_path: Path) -> None:
    """The first three layers run on one device, the others on another; stages stand on both."""
    inputs = {name: value.cuda() for name, value in build_inputs(family, MIXED).items()}
    single = build_model(family)
    single.save_pretrained(tmp_path)
    decoder = next(name for name, module in single.named_modules() if module is single.get_decoder())
    places = {"": 0} | {f"{decoder}.layers.{layer}": 1 for layer in range(3, 6)} | {f"{decoder}.norm": 1}
    spread = type(single).from_pretrained(tmp_path, device_map=places).eval().requires_grad_(False)
    spread.generation_config = single.generation_config
    answers = []
    for model in (spread, single.cuda()):
        with attach(model, FastV(), schedule=schedule_of(family)) as pruner:
            answer = generate(model, inputs)
            answers.append((pruner.trace, answer))
    (trace, answer), (expected_trace, expected) = answers
    for stage, other in zip(trace, expected_trace, strict=True):
        assert torch.equal(stage.indices.cpu(), other.indices.cpu())
    assert torch.equal(answer.sequences.cpu(), expected.sequences.cpu())
    for step, other in zip(answer.logits, expected.logits, strict=True):
        torch.testing.assert_close(step.cpu(), other.cpu(), atol=ATOL, rtol=1e-4)
