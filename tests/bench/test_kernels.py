"""The kernel and decode suites on tiny sizes: rows and files, resuming, peers and oracle, and what aborts a run."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass

import pytest
import torch

from bench import attention, common, kernels, run, topk
from bench.attention import AttentionCase
from bench.common import COLUMNS, Case, Peaks, Report, Settings, WrongResultError, read_csv
from bench.kernels import Plan, decode_plan, kernels_plan

CPU = torch.device("cpu")
SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
SETTINGS = Settings(CPU, Peaks({torch.float32: 1e11}, 1e10), seconds=0.01, min_rounds=2)
PEERS = {
    "masked_attention hard fwd+bwd": (
        "toprl (eager)|torch eager (Eq. 7)|sdpa bool mask|sdpa bool mask + build|sdpa float mask|flex mask_mod|"
        "flex mask_mod + BlockMask|flex compacted + lse|torch.compile of eager|sdpa dense (bound)|"
        "sdpa over kept tokens (floor)"
    ),
    "masked_attention soft fwd+bwd+mask": (
        "toprl (eager)|torch eager (Eq. 7)|sdpa float mask + build|flex score_mod|"
        "torch.compile of eager|sdpa dense (bound)"
    ),
    "topk_compact fwd+bwd": (
        "toprl (eager)|torch.topk + sort + gather|torch.topk + sort + index_select|"
        "torch.compile of topk + sort + gather"
    ),
    "compact_cache fwd": "toprl (eager)|gather|index_select",
    "actor_score fwd": "toprl (eager)|nn.Sequential|torch.compile of nn.Sequential",
    "sample_keep_mask fwd": "toprl (eager)|plain torch",
    "decode hard fwd": "toprl (eager)|sdpa bool mask|sdpa all keys (bound)",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Rows and summary of both suites, run through the script's own main; the summary is its last line."""
    folder = tmp_path_factory.mktemp("bench")
    rows, summary = [], {}
    for suite in ("kernels", "decode"):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert run.main(["--suite", suite, "--tiny", "--device", "cpu", "--output_dir", str(folder)]) == 0
        summary |= json.loads(printed.getvalue().splitlines()[-1])["suites"]
        rows += read_csv(folder / f"{suite}.csv")
    return rows, summary, folder


@pytest.mark.slow
def test_every_provider_of_every_case_has_a_row_with_a_time_or_a_reason(finished):
    rows, summary, folder = finished
    assert sum(len(suite["rows"]) for suite in summary.values()) == len(rows)
    for name in ("targets", "memory", "peaks"):
        assert read_csv(folder / f"kernels_{name}.csv") and summary["kernels"][name]
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        assert [row["provider"] for row in of_case] == PEERS[f"{of_case[0]['op']} {of_case[0]['mode']}"].split("|"), (
            case
        )
    for row in rows:
        assert list(row)[: len(COLUMNS)] == COLUMNS and row["torch"] == torch.__version__
        if row["p50_ms"] is None:
            assert row["note"], f"{row['provider']} has neither time nor reason"
            continue
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["rounds"] >= 2
        assert row["gbps"] > 0 and row["floor_percent"] > 0 and row["peak_mib"] >= 0
        assert row["role"] == "bound" or row["error_ratio"] <= 1 or "exceeds the budget" in row["note"]
        ours = next(r for r in rows if r["case"] == row["case"] and r["role"] == "ours")
        assert row["ratio_to_ours"] == pytest.approx(row["p50_ms"] / ours["p50_ms"])
    notes = {row["provider"]: row["note"] for row in rows if row["mode"] == "hard fwd+bwd"}
    assert notes["flex mask_mod"] == "left out here: the plan pays for torch.compile in other cases"


def test_useful_work_of_attention():
    """16 of 64 tokens kept, causal: each row sees the kept ones before it and itself; 4 heads of 64, 2 products."""
    case = AttentionCase(64, **SMALL)
    keep = attention.make_inputs(case, CPU).keep
    pairs = sum(1 for i in range(64) for j in range(i + 1) if keep[0, j] or i == j)
    moved = 4 * 64 * 64 * (2 * 4 + 2 * 2)  # query and output with 4 heads, key and value with 2
    assert attention.work_of(case, keep) == (2 * 2 * 64 * 4 * pairs, moved)


# -- resuming ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy(Case):
    name: str
    dies: bool = False

    def label(self):
        return self.name

    def bench(self, settings):
        if self.dies:
            raise KeyboardInterrupt
        return [{"case": self.name, "op": "x", "p50_ms": 1.0}]


def test_a_killed_run_loses_one_case_and_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "measure_peaks", lambda device, dtypes, size: SETTINGS.peaks)
    plan = Plan([Toy("a"), Toy("b", dies=True)], 0.01, 2)
    with pytest.raises(KeyboardInterrupt):
        kernels.run("quick", CPU, Report("decode", {"size": "quick"}, tmp_path), plan)
    report = Report("decode", {"size": "quick"}, tmp_path, resume=True)
    kernels.run("quick", CPU, report, Plan([Toy("a", dies=True), Toy("b")], 0.01, 2))
    assert [row["case"] for row in report.rows] == ["a", "b"] == [r["case"] for r in read_csv(tmp_path / "decode.csv")]


def test_resume_refuses_rows_of_another_machine(tmp_path):
    Report("kernels", {"torch": "2.13.0", "size": "quick"}, tmp_path).add([{"case": "a"}])
    with pytest.raises(ValueError, match=r"torch='2.13.0', this run has '2.11.0'"):
        Report("kernels", {"torch": "2.11.0", "size": "quick"}, tmp_path, resume=True)
    with pytest.raises(ValueError, match="--output_dir"):
        Report("kernels", {}, None, resume=True)


# -- correctness gate ----------------------------------------------------------------------------------------------


def spoiled_output(right):
    return lambda *args, **options: right(*args, **options) * (1 + 1e-4)


def spoiled_gradient(right):  # the same values, another gradient
    return lambda q, k, v, m, **options: right(q, k, v, m, **options) + 1e-3 * (v - v.detach())[:, :1]


def spoiled_selection(right):
    return lambda hidden, scores, k, **options: right(hidden, -scores, k, **options)


@pytest.mark.parametrize(
    ("module", "op", "spoil", "case"),
    [
        (attention, "masked_attention", spoiled_output, AttentionCase(64, mode="fwd+bwd", **SMALL)),
        (attention, "masked_attention", spoiled_gradient, AttentionCase(64, mode="fwd+bwd", **SMALL)),
        (topk, "topk_compact", spoiled_selection, topk.TopkCase(64, 16, 32)),
    ],
)
def test_a_wrong_op_aborts_before_timing(module, op, spoil, case, monkeypatch):
    right = getattr(module, op)
    wrong = spoil(right)
    monkeypatch.setattr(module, op, lambda *a, **k: (right if k.get("backend") == "reference" else wrong)(*a, **k))
    monkeypatch.setattr(common, "time_interleaved", lambda *a, **k: pytest.fail("timed a wrong result"))
    with pytest.raises(WrongResultError, match=rf"^{op} .*toprl \(eager\): error .* exceeds the budget"):
        case.measure(SETTINGS)


# -- peers, oracle, plans ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"batch": 3}, {"causal": False}, {"pattern": "clustered"}, {"keep": 1.0}])
def test_peers_compute_the_same_gradients(change):
    """Several samples, several blocks of rows: all peers that run here are within budget."""
    rows = AttentionCase(600, mode="fwd+bwd", **{**SMALL, **change}).measure(SETTINGS)
    ran = [row for row in rows if row["role"] == "peer" and row["p50_ms"] is not None]
    assert len(ran) == 4
    assert [row["provider"] for row in ran if row["error_ratio"] > 1] == []


@pytest.mark.parametrize("causal", [True, False])
def test_oracle_in_blocks_is_the_definition(causal, monkeypatch):
    case = AttentionCase(50, mask="straight-through", mode="fwd+bwd+mask", causal=causal, **SMALL)
    x = attention.make_inputs(case, CPU)
    whole = attention.oracle(case, x)
    monkeypatch.setattr(attention, "ORACLE_ROWS", 16)
    assert len(whole) == 5
    for part, full in zip(attention.oracle(case, x), whole, strict=True):
        torch.testing.assert_close(part, full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", ["random", "clustered"])
def test_masks_keep_exactly_what_the_case_says(pattern):
    keep = attention.make_keep(AttentionCase(576, keep=0.1, pattern=pattern, batch=3), torch.Generator().manual_seed(0))
    assert keep.sum(dim=1).tolist() == [58] * 3
    runs = 1 + (keep[:, 1:] != keep[:, :-1]).sum(dim=1)
    assert (runs.max() <= 5) if pattern == "clustered" else (runs.min() > 50)


def test_plans_cover_the_paper_s_sizes_and_quick_compiles_little():
    full, quick = (kernels_plan(size, CPU).cases for size in ("full", "quick"))
    labels = [case.label() for case in full]
    for mode in ("hard fwd ", "hard fwd+bwd ", "soft fwd+bwd+mask "):
        sizes = {case.num_tokens for case in full if f"masked_attention {mode}" in case.label()}
        assert sizes >= {576, 1024, 2048, 2880, 4096}
    for words in ("keep 10%", "keep 100%", "clustered", "B32 H8", "non-causal", "straight-through", "sample_keep_mask"):
        assert any(words in label for label in labels), words
    assert sum(case.compiled for case in quick) == 1 and len(quick) < len(full)
    cuda = torch.device("cuda")
    for plan in (kernels_plan("full", cuda), decode_plan("full", cuda)):
        assert len({case.label() for case in plan.cases}) >= 15
        assert torch.bfloat16 in {case.dtype for case in plan.cases}


def test_numbers_of_a_csv(tmp_path):
    rows = [{"a": 1, "b": 0.5, "c": None, "d": "x", "e": True}]
    common.write_csv(tmp_path / "t.csv", rows)
    assert read_csv(tmp_path / "t.csv") == rows
    assert read_csv(tmp_path / "missing.csv") == []
