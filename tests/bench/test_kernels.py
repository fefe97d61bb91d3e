"""The kernel suite on tiny sizes: rows and files, notes of peers that cannot run, and that a wrong result aborts it."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch

from bench import kernel_attention, kernel_measure, kernel_peers, kernel_topk, kernels, run
from bench.kernel_cases import ActorCase, AttentionCase, CacheCase, Plan, TopkCase, plan_of
from bench.kernel_measure import (
    COLUMNS,
    Built,
    Check,
    Peaks,
    Provider,
    Settings,
    Work,
    WrongResultError,
    compare,
    peak_memory,
    reason_of,
)
from bench.report import Report
from toprl_kernels import masked_attention

CPU = torch.device("cpu")
SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
PLAN = Plan(
    attention=(
        *(AttentionCase(n, mode=mode, **SMALL) for n in (64, 128) for mode in ("fwd", "fwd+bwd")),
        *(AttentionCase(n, mask="soft", mode="fwd+bwd+mask", **SMALL) for n in (64, 128)),
    ),
    compaction=(AttentionCase(128, **SMALL),),
    topk=(TopkCase(64, 16, 32), TopkCase(64, 16, 32, batch=2, mode="fwd+bwd")),
    cache=(CacheCase(64, 16, num_kv_heads=2, head_dim=32),),
    actor=(ActorCase(32, 64, 16), ActorCase(32, 64, 16, mode="fwd+bwd")),
    seconds=0.01,
    min_rounds=2,
)
PEERS = {
    "masked_attention hard fwd": (
        "toprl (eager)|torch eager (Eq. 7)|sdpa bool mask|sdpa bool mask + build|sdpa float mask|sdpa compacted + lse|"
        "sdpa compacted + lse + build|flex mask_mod|flex mask_mod + BlockMask|flex compacted + lse|"
        "torch.compile of eager|sdpa dense (bound)|flash-attn dense (bound)|sdpa over kept tokens (floor)"
    ),
    "masked_attention soft fwd+bwd+mask": (
        "toprl (eager)|torch eager (Eq. 7)|sdpa float mask + build|flex score_mod|"
        "torch.compile of eager|sdpa dense (bound)|flash-attn dense (bound)"
    ),
    "compacted_attention fwd": "masked_attention, all kept|gather q, k, v + sdpa|sdpa over kept tokens (floor)",
    "topk_compact fwd": (
        "toprl (eager)|torch.topk + sort + gather|torch.topk + sort + index_select|"
        "torch.compile of topk + sort + gather"
    ),
    "compact_cache fwd": "toprl (eager)|toprl, in place|gather|index_select",
    "actor_score fwd": "toprl (eager)|nn.Sequential|torch.compile of nn.Sequential",
}
PEERS["masked_attention hard fwd+bwd"] = PEERS["masked_attention hard fwd"]
PEERS["topk_compact fwd+bwd"] = PEERS["topk_compact fwd"]
PEERS["actor_score fwd+bwd"] = PEERS["actor_score fwd"]


SETTINGS = Settings(CPU, Peaks({torch.float32: 1e11}, 1e10), seconds=0.01, min_rounds=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Output of one run through the script's own main: (last line of stdout, folder)."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "plan_of", lambda quick, device: PLAN)
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *args, **_: printed.append(" ".join(map(str, args))))
        code = run.main(["--suite", "kernels", "--quick", "--device", "cpu", "--output_dir", str(folder)])
    assert code == 0
    return printed[-1], folder


@pytest.fixture(scope="module")
def rows(finished):
    return json.loads((finished[1] / "kernels.json").read_text())["rows"]


# -- rows and files --------------------------------------------------------------------------------------------------


def test_every_provider_of_every_case_has_a_row(rows):
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        expected = PEERS[f"{mine[0]['op']} {mine[0]['mode']}"].split("|")
        assert [row["provider"] for row in mine] == expected, case
    assert len({row["case"] for row in rows}) == 12


def test_columns_and_numbers(rows):
    for row in rows:
        assert list(row) == COLUMNS
        if row["p50_ms"] is None:
            assert row["note"], f"{row['provider']} has neither time nor reason"
            continue
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["rounds"] >= 2
        assert row["gbps"] > 0 and row["floor_percent"] > 0 and row["peak_mib"] >= 0
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        if row["role"] != "bound":
            assert row["error_ratio"] <= 1 or "exceeds the budget" in row["note"]
        ours = next(r for r in rows if r["case"] == row["case"] and r["role"] == "ours")
        assert row["ratio_to_ours"] == row["p50_ms"] / ours["p50_ms"]


def test_what_cannot_run_says_why(rows):
    notes = {row["provider"]: row["note"] for row in rows if row["mode"] == "hard fwd"}
    assert notes["flash-attn dense (bound)"].startswith("flash-attn is not installed")
    assert notes["flex mask_mod"] == "left out here: the plan pays for torch.compile in other cases"


def test_useful_work_of_attention(rows):
    """16 of 64 tokens kept, causal: each row sees the kept ones before it and itself; 4 heads of 64, 2 products."""
    case = PLAN.attention[0]
    keep = kernel_attention.make_inputs(case, CPU).keep[0].tolist()
    pairs = sum(1 for i in range(64) for j in range(i + 1) if keep[j] or i == j)
    ours = next(row for row in rows if row["case"] == case.label())
    assert ours["tflops"] == pytest.approx(2 * 2 * 64 * 4 * pairs / (ours["p50_ms"] * 1e-3) / 1e12)
    moved = 4 * 64 * 64 * (2 * 4 + 2 * 2)  # query and output with 4 heads, key and value with 2
    assert ours["gbps"] == pytest.approx(moved / (ours["p50_ms"] * 1e-3) / 1e9)


def test_memory_of_a_mask_is_seen(rows):
    """Eq. 7 by autograd holds several N x N matrices per head; the given bool mask counts though it is made before."""
    at = {
        row["provider"]: row["peak_mib"] for row in rows if row["mode"] == "hard fwd+bwd" and row["num_tokens"] == 128
    }
    assert at["torch eager (Eq. 7)"] > 3 * 4 * 4 * 128 * 128 / 2**20
    built, given = at["sdpa bool mask + build"], at["sdpa bool mask"]
    assert given >= 128 * 128 / 2**20 and given > 0.9 * built


def test_files_and_last_line(finished, rows):
    last, folder = finished
    summary = json.loads(last)["suites"]["kernels"]
    assert summary["rows"] == rows
    assert summary["targets"] and summary["memory"] and summary["peaks"]
    with (folder / "kernels.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) and {"p50_ms", "note", "git_commit", "torch"} <= set(table[0])
    figures = sorted(path.name for path in (folder / "figures").iterdir())
    ops = "actor_score compact_cache compacted_attention masked_attention topk_compact".split()
    assert figures == [f"{op}.png" for op in ops]
    assert all((folder / "figures" / name).read_bytes()[:4] == b"\x89PNG" for name in figures)


@pytest.fixture
def two_cases(monkeypatch):
    """A run of two small cases that does not measure the machine first."""
    monkeypatch.setattr(kernels, "plan_of", lambda quick, device: Plan((), (), PLAN.topk, (), (), 0.01, 2))
    monkeypatch.setattr(kernels, "measure_peaks", lambda device, dtypes, quick: SETTINGS.peaks)


def test_a_killed_run_loses_one_case_and_is_resumed(tmp_path, two_cases, monkeypatch):
    measured = []
    bench_topk = kernels.bench_topk

    def count_or_die(case, settings):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(case)
        return bench_topk(case, settings)

    monkeypatch.setattr(kernels, "bench_topk", count_or_die)
    with pytest.raises(KeyboardInterrupt):
        kernels.run(True, CPU, Report("kernels", {"quick": True}, tmp_path))
    saved = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["case"] for row in saved} == {PLAN.topk[0].label()}

    monkeypatch.setattr(kernels, "bench_topk", lambda case, settings: [{**saved[0], "case": case.label()}])
    report = Report("kernels", {"quick": True}, tmp_path, resume=True)
    kernels.run(True, CPU, report)
    assert report.rows == [*saved, {**saved[0], "case": PLAN.topk[1].label()}]


def test_resume_refuses_rows_of_another_machine(tmp_path):
    Report("kernels", {"torch": "2.13.0", "quick": True}, tmp_path).add([{"case": "a"}])
    with pytest.raises(ValueError, match=r"torch='2.13.0', this run has '2.11.0'"):
        Report("kernels", {"torch": "2.11.0", "quick": True}, tmp_path, resume=True)
    with pytest.raises(ValueError, match="--output_dir"):
        Report("kernels", {}, None, resume=True)


# -- correctness gate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoiled", ["output", "gradient"])
def test_a_wrong_op_aborts_before_timing(spoiled, monkeypatch):
    right = kernel_attention.masked_attention

    def wrong(query, key, value, mask, **options):
        output = right(query, key, value, mask, **options)
        if options.get("backend") == "reference":
            return output
        if spoiled == "output":
            return output * (1 + 1e-4)
        return output + 1e-3 * (value - value.detach())[:, :1]  # the same values, another gradient

    monkeypatch.setattr(kernel_attention, "masked_attention", wrong)
    monkeypatch.setattr(kernel_measure, "time_interleaved", lambda *a, **k: pytest.fail("timed a wrong result"))
    with pytest.raises(WrongResultError, match=r"hard fwd\+bwd .*toprl \(eager\): error .* exceeds the budget"):
        kernel_attention.bench_attention(AttentionCase(64, mode="fwd+bwd", **SMALL), SETTINGS)


def test_a_wrong_selection_aborts_the_run(two_cases, monkeypatch):
    right = kernel_topk.topk_compact

    def wrong(hidden, scores, k, **options):
        return right(hidden, scores if options.get("backend") else -scores, k, **options)

    monkeypatch.setattr(kernel_topk, "topk_compact", wrong)
    report = Report("kernels", {})
    with pytest.raises(WrongResultError, match="topk_compact fwd"):
        kernels.run(True, CPU, report)
    assert report.rows == []


def measured(*peers):
    """Rows of ``compare`` with an op of ours that returns 1, and its peers, by name."""
    ours = Provider("ours", lambda: Built(lambda: [torch.ones(4)]), role="ours")
    rows = compare(
        {"case": "toy"},
        torch.float32,
        [ours, *peers],
        lambda results: Check(float((results[0] - 1).abs().max()), 0.01),
        Work(0.0, 16.0),
        SETTINGS,
    )
    return {row["provider"]: row for row in rows}


def test_peers_that_are_inexact_wrong_or_broken_become_notes():
    def broken():
        try:
            raise NotImplementedError("no backward on CPU\nand more lines")
        except NotImplementedError as error:
            raise RuntimeError("compilation failed") from error

    def returns(value):
        return lambda: Built(lambda: [torch.full((4,), value)])

    rows = measured(
        Provider("inexact", returns(1.02)),
        Provider("wrong", returns(3.0)),
        Provider("nan", returns(math.nan)),
        Provider("broken", lambda: Built(broken)),
        Provider("bound", returns(7.0), role="bound"),
        Provider("given", lambda: Built(lambda: [torch.ones(4)], resident=8 * 2**20)),
    )
    assert rows["inexact"]["p50_ms"] > 0 and "exceeds the budget" in rows["inexact"]["note"]
    for name in ("wrong", "nan"):
        assert rows[name]["p50_ms"] is None and rows[name]["note"].endswith("wrong result, not timed")
    assert rows["broken"]["note"] == "cannot run: NotImplementedError: no backward on CPU"
    assert rows["broken"]["p50_ms"] is None and rows["broken"]["rounds"] == 0
    assert rows["given"]["peak_mib"] == pytest.approx(8, abs=0.01) and rows["ours"]["peak_mib"] < 0.01
    assert rows["bound"]["p50_ms"] > 0 and rows["bound"]["error"] is None
    assert rows["ours"]["note"] == "" and rows["ours"]["ratio_to_ours"] == 1.0


def test_reason_inside_dynamo_s_quotation():
    found = reason_of(RuntimeError("raised exception NotImplementedError('no backward on CPU')"))
    assert found == "NotImplementedError: no backward on CPU"


def test_peak_memory_counts_what_is_alive_at_once():
    def call():
        for _ in range(3):
            a = torch.ones(2**18)  # 1 MiB each
            b = a + 1
            del a, b
        return torch.ones(2**16)

    assert peak_memory(call, CPU) == pytest.approx(2 * 2**20, rel=0.01)


# -- peers and oracle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"batch": 3}, {"causal": False}, {"pattern": "clustered"}, {"keep": 1.0}])
def test_peers_compute_the_same_gradients(change):
    """Several samples, several blocks of rows: all peers that run here are within budget."""
    case = AttentionCase(600, mode="fwd+bwd", **{**SMALL, **change})
    rows = kernel_attention.bench_attention(case, SETTINGS)
    ran = [row for row in rows if row["role"] == "peer" and row["p50_ms"] is not None]
    assert len(ran) == 6
    assert [row["provider"] for row in ran if row["error_ratio"] > 1] == []


def test_compacted_peer_where_rows_see_no_kept_key(monkeypatch):
    """aten reports a log-sum-exp of 0 for a row without keys; the first block has such rows, a later one none."""
    monkeypatch.setattr(kernel_peers, "ROW_BLOCK", 32)
    x = kernel_attention.make_inputs(AttentionCase(100, **SMALL), CPU)
    keep = x.keep.index_fill(1, torch.arange(40), False)
    leaves = [tensor.double().requires_grad_() for tensor in (x.query, x.key, x.value)]
    want = masked_attention(*leaves, keep, is_causal=True, backend="reference")
    kept = kernel_peers.compaction_of(keep, True, torch.float64)
    assert [block.keys == 0 for block in kept.blocks] == [True, False, False, False]
    assert [block.empty is not None for block in kept.blocks] == [True, True, False, False]
    got = kernel_peers.compacted_attention(*leaves, kept)
    upstream = x.grad_output.double()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # the merge is in float32
    for part, full in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(part, full, rtol=0, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_oracle_in_blocks_is_the_definition(causal, monkeypatch):
    case = AttentionCase(50, mask="straight-through", mode="fwd+bwd+mask", causal=causal, **SMALL)
    x = kernel_attention.make_inputs(case, CPU)
    monkeypatch.setattr(kernel_attention, "ORACLE_ROWS", 16)
    blocks = kernel_attention.oracle(case, x)
    monkeypatch.setattr(kernel_attention, "ORACLE_ROWS", 50)
    whole = kernel_attention.oracle(case, x)
    assert len(blocks) == 5
    for part, full in zip(blocks, whole, strict=True):
        torch.testing.assert_close(part, full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", ["random", "clustered"])
def test_masks_keep_exactly_what_the_case_says(pattern):
    case = AttentionCase(576, keep=0.1, pattern=pattern, batch=3)
    keep = kernel_attention.make_keep(case, torch.Generator().manual_seed(0))
    assert keep.sum(dim=1).tolist() == [58] * 3
    runs = 1 + (keep[:, 1:] != keep[:, :-1]).sum(dim=1)
    assert (runs.max() <= 5) if pattern == "clustered" else (runs.min() > 50)


def test_plans_cover_the_paper_s_sizes_and_quick_compiles_little():
    full, quick = (plan_of(quick, CPU) for quick in (False, True))
    for mode in ("hard fwd", "hard fwd+bwd", "soft fwd+bwd+mask"):
        assert {case.num_tokens for case in full.attention if case.kind == mode} >= {576, 1024, 2048, 2880, 4096}
    base = [case for case in full.attention if case.kind == "hard fwd" and case.num_tokens == 2048]
    assert {case.keep for case in base} == {0.1, 0.25, 0.5, 1.0}
    assert {case.pattern for case in base} == {"random", "clustered"}
    assert {case.batch for case in full.attention} == {1, 8, 32}
    for plan in (full, quick, plan_of(False, torch.device("cuda"))):
        labels = [label for label, _ in kernels.cases_of(plan)]
        assert len(labels) == len(set(labels))
    compiled = [*quick.attention, *quick.topk, *quick.actor]
    assert sum(case.compiled for case in compiled) == 1
