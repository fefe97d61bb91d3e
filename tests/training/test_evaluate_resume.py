"""Stopped evaluations go on where they were, on any number of ranks, and only under the same settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.evaluation_helpers import KEPT, config_of, flags_of, read_samples, save_policy, without_times
from training.evaluate import evaluate
from training.evaluation import runner as runner_module
from training.evaluation.records import Cell, Store, differences

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
# what an evaluation measures rather than computes
TIMES = ("prefill_seconds", "decode_seconds")


def numbers(results: dict) -> dict:
    """results.json without times and places."""
    rows = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in results[name]]
        for name in ("rows", "averages", "runs")
    ]
    return {name: results[name] for name in ("settings", "tasks", "schedules")} | {"rows": rows}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of an evaluation that ran in one go, and its results."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, evaluate(config_of(folder))


@pytest.fixture
def counted(monkeypatch):
    """How many samples were answered, batch by batch."""
    sizes: list[int] = []
    own = runner_module.answer_timed

    def answer(model, processor, task, samples, inputs):
        sizes.append(len(samples))
        return own(model, processor, task, samples, inputs)

    monkeypatch.setattr(runner_module, "answer_timed", answer)
    return sizes


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, counted, capsys):
    expected, expected_results = uninterrupted
    folder = tmp_path / "killed"
    config = config_of(folder)
    shard = folder / "samples-0.jsonl"
    command = [sys.executable, str(ROOT / "training/evaluate.py"), *flags_of(config)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while process.poll() is None and not (shard.is_file() and shard.read_bytes().count(b"\n") >= 12):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stdout.read().decode()[-2000:]
    left = shard.read_bytes().splitlines()
    left = [json.loads(line) for line in left if line.endswith(b"}")]
    assert 12 <= len(left) < 128
    # a kill within the write of a batch leaves the beginning of a line
    with open(shard, "ab") as file:
        file.write(json.dumps(left[-1] | {"index": 99}).encode()[:50])

    results = evaluate(config)
    output = capsys.readouterr().out
    assert "samples-0.jsonl: dropped a half-written last line" in output
    assert f"resumed: {len(left)} answers are there already" in output
    assert sum(counted) == 128 - len(left)  # nothing is computed again
    records = read_samples(folder)
    assert without_times(records) == without_times(read_samples(expected))
    assert all(record in records for record in left)  # with the times measured then
    assert numbers(results) == numbers(expected_results)
    assert sorted(path.name for path in folder.glob("samples*")) == ["samples.jsonl"]


def test_a_batch_of_which_a_part_was_written(uninterrupted, tmp_path, counted, capsys):
    expected, _ = uninterrupted
    lines = (expected / "samples.jsonl").read_text().splitlines(keepends=True)
    folder = tmp_path / "partly"
    folder.mkdir()
    (folder / "settings.json").write_text((expected / "settings.json").read_text())
    # of the unpruned batch 0 two of four samples; of others nothing; a line that a merge left twice
    (folder / "samples.jsonl").write_text("".join(lines[:2] + lines[4:]))
    (folder / "samples-3.jsonl").write_text(lines[40])
    evaluate(config_of(folder))
    assert counted == [2]
    assert "resumed: 126 answers are there already" in capsys.readouterr().out
    assert without_times(read_samples(folder)) == without_times(read_samples(expected))


@pytest.mark.slow
def test_two_ranks_equal_one_and_finish_what_three_began(uninterrupted, tmp_path):
    expected, expected_results = uninterrupted
    lines = (expected / "samples.jsonl").read_text().splitlines(keepends=True)
    folder = tmp_path / "ranks"
    folder.mkdir()
    (folder / "settings.json").write_text((expected / "settings.json").read_text())
    for rank in range(3):  # 3 x 8 of 32 unpruned samples, and one pruned
        (folder / f"samples-{rank}.jsonl").write_text("".join(lines[8 * rank : 8 * rank + 8] + lines[40 + rank : 41]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "training/evaluate.py"), *flags_of(config_of(folder))]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
    )
    seen: dict[str, bytes] = {}
    while process.poll() is None:
        seen |= {path.name: text for path in folder.glob("samples-?.jsonl") if (text := whole_lines(path))}
        time.sleep(0.02)
    output = process.stdout.read()
    process.stdout.close()
    assert process.returncode == 0, output[-3000:]
    first, second = (
        {
            (line["seed"], line["index"])
            for line in map(json.loads, seen[name].splitlines())
            if line["method"] == "random"
        }
        for name in ("samples-0.jsonl", "samples-1.jsonl")
    )
    assert first and second and not first & second  # both worked, and not twice
    assert "resumed: 25 answers are there already" in output
    assert without_times(read_samples(folder)) == without_times(read_samples(expected))
    assert numbers(json.loads((folder / "results.json").read_text())) == numbers(expected_results)


def whole_lines(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:  # merged since it was listed
        return b""
    return content[: content.rfind(b"\n") + 1]


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seeds": [0, 2]}, r"seeds: was \[0, 1\], now \[0, 2\]"),
        ({"limit": 16}, "tasks.ocr.samples: was 32, now 16"),
        ({"data_seed": 1}, "tasks.ocr.seed: was 0, now 1"),
        ({"keep": [8, 4, 3]}, r"keep: was \[8, 4, 2\], now \[8, 4, 3\]"),
        ({"stages": [1, 2, 4]}, r"stages\.random: was \[1, 2, 3\], now \[1, 2, 4\]"),
        ({"method": ["fastv"]}, r'methods: was \["full", "fastv", "random"\], now'),
        ({"dtype": "bfloat16"}, 'dtype: was "float32", now "bfloat16"'),
        ({"task": ["ocr", "shape"]}, "tasks.shape: was null"),
    ],
)
def test_changed_settings_are_refused(uninterrupted, changes, difference):
    folder, _ = uninterrupted
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=f"results of other settings .*{difference}.*--overwrite"):
        evaluate(config_of(folder, **changes))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_retrained_policy_is_refused_and_overwrite_starts_again(tmp_path):
    policy = save_policy(tmp_path / "policy", seed=0)
    config = config_of(tmp_path / "out", method=["toprl"], policy=[policy], stages=[], limit=4, overwrite=True)
    evaluate(config)  # nothing there to overwrite
    config.overwrite = False
    save_policy(tmp_path / "policy", seed=1)
    with pytest.raises(ValueError, match=r"policies: was \["):
        evaluate(config)
    (tmp_path / "out" / "samples-7.jsonl").write_text("not a line of ours\n")
    config.overwrite = True
    assert evaluate(config)["rows"][1]["method"] == "toprl"
    assert len(read_samples(tmp_path / "out")) == 8


def store_of(folder: Path, *lines: str) -> Store:
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text("{}")
    (folder / "samples-0.jsonl").write_text("".join(lines))
    return Store(folder)


RECORD = {"task": "ocr", "method": "full", "budget": "full", "seed": 0, "index": 0}


@pytest.mark.parametrize("damaged", ["{no json\n", "[]\n", '{"task": "ocr"}\n', "\0\0\n"])
def test_a_damaged_line_is_named(tmp_path, damaged):
    store = store_of(tmp_path, json.dumps(RECORD) + "\n", damaged)
    with pytest.raises(ValueError, match=r"samples-0.jsonl, line 2 is damaged"):
        store.open({})
    store.close()


def test_only_a_line_without_an_end_is_dropped(tmp_path):
    whole = json.dumps(RECORD) + "\n"
    store = store_of(tmp_path, whole, whole[:-1])
    assert store.open({}) == [
        "samples-0.jsonl: dropped a half-written last line",
        "resumed: 1 answers are there already",
    ]
    assert (tmp_path / "samples-0.jsonl").read_text() == whole
    store.close()
    assert store.open({}) == ["resumed: 1 answers are there already"]
    store.close()


def test_two_evaluations_in_one_folder(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    first.open({})
    with pytest.raises(RuntimeError, match="another evaluation is at work"):
        second.open({})
    first.close()
    assert second.open({}) == []
    second.close()


def test_answers_without_settings_are_refused(tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps(RECORD) + "\n")
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=r"samples.jsonl has no settings.json"):
        store.open({})
    store.close()


def test_answers_of_another_cell_are_refused(uninterrupted, tmp_path):
    expected, _ = uninterrupted
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "settings.json").write_text((expected / "settings.json").read_text())
    (folder / "samples-0.jsonl").write_text(json.dumps(RECORD | {"task": "shape", "num_visual": 64}) + "\n")
    with pytest.raises(ValueError, match=r"task='shape'.* is not among its settings"):
        evaluate(config_of(folder))


def test_merging_orders_and_drops_shards(tmp_path):
    cells = [Cell("ocr", "full", "full", 0), Cell("ocr", "fastv", "8", 0)]
    store = Store(tmp_path, rank=1)
    store.append([RECORD | {"method": "fastv", "budget": "8", "index": 1}, RECORD | {"index": 2}])
    Store(tmp_path, rank=0).append([RECORD, RECORD | {"index": 2}])
    found = store.merge(cells)
    assert [sorted(rows) for rows in found.values()] == [[0, 2], [1]]
    assert [(r["method"], r["index"]) for r in read_samples(tmp_path)] == [("full", 0), ("full", 2), ("fastv", 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_differences_of_settings():
    assert differences({"a": {"b": 1, "c": KEPT}}, {"a": {"b": 1, "c": KEPT}}) == []
    assert differences({"a": {"b": 1}}, {"a": {"b": 2}, "d": "x"}) == ["a.b: was 1, now 2", 'd: was null, now "x"']
