"""The paper's analyses: each runs end to end on a small scale, is resumed, drawn and judged from its JSON alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bench.prefill import LLAVA_14M
from training import reproduce
from training.analyses import efficiency, measure
from training.analyses.config import ReproduceConfig
from training.analyses.lab import Lab, path_of
from training.analyses.page import anchor
from training.analyses.registry import ANALYSES
from training.analyses.verdicts import FAILS, HOLDS, OPEN

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--task ocr shape count --ablation_task ocr --size 8 --grid_size 4 --seeds 0 --iterations 1 --train_size 16"
).split()


def flags_for(folder: Path) -> list[str]:
    return [*SMALL, "--workers", "0", "--output_dir", str(folder / "page"), "--work_dir", str(folder / "work")]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All analyses on eight samples, one training of one iteration each."""
    folder = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficiency, "CASES", {"cpu": LLAVA_14M})
        patch.setattr(efficiency, "ROUNDS", 1)
        reproduce.main(["--all", *flags_for(folder)])
    return folder


def record_of(done: Path, name: str) -> dict:
    return json.loads((done / "page/results" / f"{name}.json").read_text())


def columns_of(table: str) -> set[int]:
    return {line.count("|") for line in table.splitlines() if line.startswith("|")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_gives_json_figure_table_and_verdicts(done, name):
    record, analysis = record_of(done, name), ANALYSES[name]
    assert record["settings"]["model"] == {"name": "tiny", "dtype": "float32", "device": "cpu"}
    assert record["seconds"] > 0
    assert {"torch", "transformers", "device", "date"} <= set(record["environment"])
    with Image.open(done / f"page/{name}.png") as figure:
        assert figure.width > 600
        assert len(figure.convert("L").getcolors()) > 10  # something is drawn
    blocks = re.split(r"\n\n", analysis.table(record["result"]))
    assert all(len(columns_of(block)) <= 1 for block in blocks)
    found = analysis.verdicts(record["result"])
    assert found
    assert {verdict.outcome for verdict in found} <= {HOLDS, FAILS, OPEN}
    assert all(re.search(r"\d", verdict.evidence) for verdict in found)


@pytest.mark.slow
def test_the_page_says_what_the_verdicts_say(done):
    page = (done / "page.md").read_text()
    headings = {anchor(line[3:]) for line in page.splitlines() if line.startswith("## ")}
    assert set(re.findall(r"\]\(#(.*?)\)", page)) <= headings
    for name, analysis in ANALYSES.items():
        assert f"## {analysis.title}\n" in page
        for verdict in analysis.verdicts(record_of(done, name)["result"]):
            assert f"| {verdict.claim} | **{verdict.outcome}**" in page
            assert verdict.evidence in page
    for link in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (done / link).is_file()
    assert "{" not in page


@pytest.mark.slow
def test_what_is_there_is_not_made_again(done, monkeypatch, capsys):
    path = done / "page/results/cliff.json"
    before = path.read_bytes()

    def never(*args):
        raise AssertionError("a finished job was done again")

    monkeypatch.setattr(measure, "_answer_all", never)
    reproduce.main(["cliff", *flags_for(done)])
    assert "cliff.json is there already" in capsys.readouterr().out
    # without the result the finished jobs give it again, but for the date the same
    path.unlink()
    reproduce.main(["cliff", *flags_for(done)])
    assert json.loads(path.read_bytes())["result"] == json.loads(before)["result"]
    with pytest.raises(AssertionError, match="done again"):
        reproduce.main(["cliff", *flags_for(done), "--size", "9"])
    assert "size: was 8, now 9" in capsys.readouterr().out


@pytest.mark.slow
def test_agents_are_shared(done):
    """Strips, main, transfer, video and ablations of one task and seed use one policy."""
    config = ReproduceConfig(iterations=1, train_size=16)
    arguments = measure.training(config, "ocr", 0, (1, 2, 3)) | {"made_with": Lab(done, 0).made_with}
    assert path_of(measure.train, arguments, done / "work").is_file()
    policies = [path.name for path in (done / "work/policies").glob("ocr_seed0_*")]
    assert len(policies) == 1 + 10  # the shared one and an ablation each


@pytest.mark.slow
def test_processes_give_what_this_process_gives(done, tmp_path):
    config = ReproduceConfig(task=["ocr", "count"], size=8)
    arguments = [measure.answering(config, task, [measure.one_run("full")]) for task in config.task]
    with Lab(tmp_path, 2) as lab:
        elsewhere = lab.map(measure.evaluate, arguments, "tasks")
    assert lab.seconds > 0
    assert elsewhere == [measure.evaluate(one, done / "work") for one in arguments]


def test_list_names_everything(capsys):
    reproduce.main(["--list"])
    shown = capsys.readouterr().out
    for name, analysis in ANALYSES.items():
        assert re.search(rf"^{name} +[\d.]+  {re.escape(analysis.title)}$", shown, re.MULTILINE)


@pytest.mark.slow
def test_help_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "training/reproduce.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--ablation_task" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["cliffs"], "cliffs: unknown; known: cliff"),
        ([], "nothing to do"),
        (["cliff", "--size", "0"], "--size 0 must be at least 1"),
        (["cliff", "--workers", "-1"], "--workers -1"),
        (["cliff", "--seeds", "1", "1"], "--seeds 1 1"),
        (["cliff", "--budget", "14", "21"], "tighter budget must come last"),
        (["cliff", "--dataset_path", "data"], "--dataset_path data: must be TASK=PATH"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        reproduce.parse(flags)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("transfer", ["--task", "ocr", "count"], "needs two tasks of one level"),
        ("cliff", ["--task", "ocr"], "the levels are \\['perception'\\]"),
        ("video", ["--model_name_or_path", "some/model"], "use training/evaluate.py"),
    ],
)
def test_what_an_analysis_refuses(name, flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        reproduce.main([name, *flags, "--workers", "0", "--output_dir", str(tmp_path), "--work_dir", str(tmp_path)])


def test_a_page_needs_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no results"):
        reproduce.main(["--page", "--output_dir", str(tmp_path / "none")])


def test_json_keeps_lists_of_numbers_on_a_line():
    value = {"scores": [[1, 0, 0.5], []], "names": ["a", "b"], "deep": {"one": [1.5]}}
    text = reproduce.compact(value)
    assert json.loads(text) == value
    assert "[1, 0, 0.5]" in text
    assert "[1.5]" in text
