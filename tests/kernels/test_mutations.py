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


ATTENTION, LANE, PATTERNS = "attention/triton.py", "test_attention_triton.py", "test_attention_patterns.py"
MAXIMUM = """
    s_self = row_max
    k_base, stride_k = head_of(key, batch, kv_head)
    for other in range(0, host_int(counts.keys)):
        dims = tl.arange(0, S.BLOCK_D)
        k_other = tl.load(k_base + other * stride_k + dims, mask=dims < S.HEAD_DIM, other=0.0).to(tl.float32)
        row_max = tl.maximum(row_max, tl.sum(q.to(tl.float32) * k_other[None, :], 1) * scale_log2)
    row_sum = 1.0 - listed(lists, MASK, tokens)
    row_sum = row_sum * tl.exp2(s_self - row_max)
"""
BROKEN_ATTENTION = [
    ("missing diagonal", "row_sum = 1.0 - listed(lists, MASK, tokens)", "row_sum = 0.0 * listed(lists, MASK, tokens)"),
    ("maximum over all keys", "  # s_ii [M]\n    row_sum = 1.0 - listed(lists, MASK, tokens)  # [M]\n", MAXIMUM),
    ("swapped strides", "_heads(self.query), _heads(self.key), _heads(self.value)",
     "_heads(self.query), Heads(self.key, *self.value.stride()[:3]), Heads(self.value, *self.key.stride()[:3])"),
    ("causal test off by one", "columns[None, :] <= walk.tokens[:, None]", "columns[None, :] < walk.tokens[:, None]"),
    ("mask gradient with the self term", "by_mask = tl.where(is_self, 0.0, by_mask)", "by_mask = by_mask + 0.0"),
    ("NaN of an invisible value", "v, poison = finite_rows(v)", "_, poison = finite_rows(v)"),
    ("NaN of a row without a gradient", "is_valid & (tl.sum((do != 0.0).to(tl.int32), 1) > 0)", "is_valid"),
    ("a range one key too long", "(columns[None, :] < tl.load(bounds + 1)", "(columns[None, :] <= tl.load(bounds + 1)"),
    ("queries lost between programs that share a key block",
     "share = (S.GROUPS * blocks + splits - 1) // splits", "share = S.GROUPS * blocks // splits"),
    ("self term missing in decoding", "self_weight = rest * tl.exp2", "self_weight = 0.0 * tl.exp2"),
]  # fmt: skip
MUTATIONS = [
    *(Mutation(f"{name} (Triton)", ATTENTION, old, new, LANE) for name, old, new in BROKEN_ATTENTION),
    Mutation("row offsets in 32 bits (Triton)", ATTENTION,
             "    dims = tl.arange(0, BLOCK)\n    pointers = base + rows.to(tl.int64)[:, None] * stride",
             "    dims = tl.arange(0, BLOCK)\n    pointers = base + (rows[:, None] * stride).to(tl.int32)",
             "test_large_offsets.py"),
    Mutation("NaN of an invisible token enters a product (Triton)", ATTENTION,
             "return tl.where((poison == 0.0)[:, None], tile, 0.0), poison", "return tile, poison", LANE),
    Mutation("NaN of an invisible token enters a product, eager", "attention/eager.py",
             "if all(map(_is_finite, (query, key, value))):", "if True:", PATTERNS),
    Mutation("missing diagonal (eager)", "attention/eager.py",
             "torch.log1p(-mask[:, own])", "torch.log(0.0 * mask[:, own])", "test_masked_attention.py"),
    Mutation("maximum over all keys (definition)", "attention/reference.py",
             "counts = (allowed & (gate > 0))", "counts = allowed | (gate > 0)", "test_masked_attention.py"),
    Mutation("off by one in the tie rule (Triton)", "topk/triton.py",
             "(equal & (equal_before < ties))", "(equal & (equal_before <= ties))", "test_topk_compact_lanes.py"),
    Mutation("mean of LayerNorm not taken out of float32 rows (Triton)", "actor/triton.py",
             "z = gelu((acc - (mean - center)[:, None]", "z = gelu((acc - mean[:, None]", "test_actor_score.py"),
    Mutation("an invalid token in the sample's mean (Triton)", "actor/triton.py",
             "total = tl.sum(tl.where(counted[:, None], z, 0.0), 0)", "total = tl.sum(z, 0)", "test_actor_score.py"),
    Mutation("gradients of registered ops lost", "dispatch.py",
             "op.register_autograd(backward, setup_context=setup_context)", "pass", "test_every_op.py"),
    Mutation("configuration that computes products twice", "configs.py",
             '"sm_90", HALF, C(64, 128, 8, 3), C(64, 128, 8, 2)', '"sm_90", HALF, C(64, 128, 8, 3), C(32, 64, 8, 2)',
             "test_compile_report.py"),
]  # fmt: skip


def test_every_line_to_break_is_there() -> None:
    for mutation in MUTATIONS:
        text = (ROOT / "src" / "toprl_kernels" / mutation.file).read_text()
        assert text.count(mutation.old) == 1, f"{mutation.name}: the line to break is not in {mutation.file}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_turns_red(mutation: Mutation, tmp_path: Path) -> None:
    sources = tmp_path / "src"
    shutil.copytree(ROOT / "src", sources, ignore=shutil.ignore_patterns("__pycache__"))
    file = sources / "toprl_kernels" / mutation.file
    text = file.read_text()
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
