"""Break the kernels on purpose, one line at a time, and see the tests turn red.

    pytest -m exhaustive tests/kernels/test_mutations.py -rP

Each mutation is applied to a copy of the sources; the lane named beside it runs against the copy and must fail. The
test prints which of its tests did.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Mutation(NamedTuple):
    name: str
    file: str  # below src/toprl_kernels
    old: str  # occurs exactly once
    new: str
    lane: str  # below tests/kernels


ATTENTION = "attention/triton.py"
ATTENTION_LANE = "test_attention_triton.py"
MUTATIONS = [
    Mutation(
        "off by one in the tie rule (Triton)",
        "topk/triton.py",
        "taken = above | (equal & (equal_before < ties))",
        "taken = above | (equal & (equal_before <= ties))",
        "test_topk_compact_lanes.py",
    ),
    Mutation(
        "missing diagonal (Triton)",
        ATTENTION,
        "row_sum = 1.0 - load_float(lists + MASK * list_stride + tokens)",
        "row_sum = 0.0 * load_float(lists + MASK * list_stride + tokens)",
        ATTENTION_LANE,
    ),
    Mutation(
        "missing diagonal (eager)",
        "attention/eager.py",
        "torch.log1p(-mask[:, own])",
        "torch.log(0.0 * mask[:, own])",
        "test_masked_attention.py",
    ),
    Mutation(
        "maximum over all keys (Triton)",
        ATTENTION,
        "  # s_ii [M]\n    row_sum = 1.0 - load_float(lists + MASK * list_stride + tokens)",
        "\n    s_self = row_max"
        "\n    for other in range(0, host_int(num_keys)):"
        "\n        k_other = tl.load(k_base + other * stride_kn + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)"
        "\n        row_max = tl.maximum(row_max, tl.sum(q.to(tl.float32) * k_other[None, :], 1) * scale_log2)"
        "\n    row_sum = 1.0 - load_float(lists + MASK * list_stride + tokens)"
        "\n    row_sum = row_sum * tl.exp2(s_self - row_max)",
        ATTENTION_LANE,
    ),
    Mutation(
        "maximum over all keys (definition)",
        "attention/reference.py",
        "counts = (allowed & (gate > 0)) | (is_self & ~is_row)",
        "counts = allowed | (gate > 0) | (is_self & ~is_row)",
        "test_masked_attention.py",
    ),
    Mutation(
        "swapped strides (Triton)",
        ATTENTION,
        "inputs = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])",
        "inputs = (*query.stride()[:3], *value.stride()[:3], *key.stride()[:3])",
        ATTENTION_LANE,
    ),
    Mutation(
        "causal test off by one (Triton)",
        ATTENTION,
        "visible = visible & (columns[None, :] <= tokens[:, None])",
        "visible = visible & (columns[None, :] < tokens[:, None])",
        ATTENTION_LANE,
    ),
    Mutation(
        "mask gradient with the self term (Triton)",
        ATTENTION,
        "by_mask = tl.where(is_self, 0.0, by_mask)",
        "by_mask = by_mask + 0.0",
        ATTENTION_LANE,
    ),
    Mutation(
        "row offsets in 32 bits (Triton)",
        ATTENTION,
        "pointers = base + rows.to(tl.int64)[:, None] * stride",
        "pointers = base + (rows[:, None] * stride).to(tl.int32)",
        "test_large_offsets.py",
    ),
    Mutation(
        "NaN of an invisible value (Triton)",
        ATTENTION,
        "v, poison = finite_rows(v)",
        "_, poison = finite_rows(v)",
        ATTENTION_LANE,
    ),
    Mutation(
        "NaN of a row without a gradient (Triton)",
        ATTENTION,
        "is_live = in_range & is_valid & (tl.sum((do != 0.0).to(tl.int32), 1) > 0)",
        "is_live = in_range & is_valid",
        ATTENTION_LANE,
    ),
    Mutation(
        "a range one key too long (Triton)",
        ATTENTION,
        "(columns[None, :] < tl.load(bounds",
        "(columns[None, :] <= tl.load(bounds",
        ATTENTION_LANE,
    ),
    Mutation(
        "queries lost between programs that share a key block (Triton)",
        ATTENTION,
        "share = (GROUPS * blocks + splits - 1) // splits",
        "share = GROUPS * blocks // splits",
        ATTENTION_LANE,
    ),
    Mutation(
        "self term missing in decoding (Triton)",
        ATTENTION,
        "self_weight = rest * tl.exp2(s_self - row_max)",
        "self_weight = 0.0 * tl.exp2(s_self - row_max)",
        ATTENTION_LANE,
    ),
    Mutation(
        "NaN of an invisible token enters a product, eager",
        "attention/eager.py",
        "if all(map(_is_finite, (query, key, value))):",
        "if True:",
        "test_attention_patterns.py",
    ),
    Mutation(
        "NaN of an invisible token enters a product (Triton)",
        ATTENTION,
        "return tl.where((poison == 0.0)[:, None], tile, 0.0), poison",
        "return tile, poison",
        "test_attention_patterns.py",
    ),
    Mutation(
        "gradients of registered ops lost",
        "dispatch.py",
        "op.register_autograd(backward, setup_context=setup_context)",
        "pass",
        "test_every_op.py",
    ),
    Mutation(
        "configuration that computes products twice",
        "configs.py",
        '_pin_attention("bwd_dkdv", "sm_90", HALF, C(64, 128, 8, 3), C(64, 128, 8, 2)',
        '_pin_attention("bwd_dkdv", "sm_90", HALF, C(64, 128, 8, 3), C(32, 64, 8, 2)',
        "test_compile_report.py",
    ),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_turns_red(mutation: Mutation, tmp_path: Path) -> None:
    sources = tmp_path / "src"
    shutil.copytree(ROOT / "src", sources, ignore=shutil.ignore_patterns("__pycache__"))
    file = sources / "toprl_kernels" / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1, f"the line to break is not in {mutation.file}"
    file.write_text(text.replace(mutation.old, mutation.new))
    environment = os.environ | {"PYTHONPATH": str(sources)}  # before the installed package
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rf", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"tests/kernels/{mutation.lane}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode < 0:  # a wrong address may take the process down
        failed.append(f"crashed by signal {-done.returncode} in {mutation.lane}")
    assert failed, f"stayed green:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    print(f"{mutation.name}: {failed[0]}")
