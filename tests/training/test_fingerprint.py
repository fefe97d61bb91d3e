"""Nothing goes on under other data, weights or code than it began with, and every sample is read before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.training.evaluation_helpers import LAYERS, config_of
from tests.training.test_evaluate import OWN_METHOD
from toprl_models import method_of, tiny
from training import fingerprint, reproduce
from training.analyses.lab import Lab
from training.evaluate import evaluate
from training.fingerprint import code_facts
from training.ppo import PPOConfig, main
from training.tasks import factory
from training.trainer import data as data_module


def change_a_pixel(folder: Path) -> None:
    with Image.open(folder / "5.png") as image:
        image.putpixel((3, 3), (1, 2, 3))
        image.save(folder / "5.png")


def change_a_line(folder: Path, column: str) -> None:
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[5][column] += " 7"
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


CHANGES = {
    "pixel": change_a_pixel,
    "question": lambda folder: change_a_line(folder, "question"),
    "answer": lambda folder: change_a_line(folder, "answer"),
}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(*_: object) -> None:
    raise AssertionError("the model was asked")


@pytest.fixture
def evaluation(own_data, tmp_path):
    """An evaluation of one method on own data, run once."""
    options = ["custom.metric=exact_match", "custom.split=train"]
    given = {"task": ["custom"], "dataset_path": [own_data], "task_option": options, "method": ["fastv"], "seeds": [0]}
    config = config_of(tmp_path / "out", **given, limit=0)
    evaluate(config)
    return config


@pytest.mark.parametrize("what", CHANGES)
def test_an_evaluation_of_changed_samples_is_refused(evaluation, tmp_path, what):
    before = files_in(tmp_path / "out")
    evaluate(evaluation)
    CHANGES[what](tmp_path)
    with pytest.raises(ValueError, match=r"tasks\.custom\.content: was .*--overwrite"):
        evaluate(evaluation)
    answers = {name: content for name, content in before.items() if "table" not in name and name != "results.json"}
    assert {name: files_in(tmp_path / "out")[name] for name in answers} == answers


def test_an_evaluation_of_changed_weights_is_refused(tmp_path):
    model, processor = tiny.load()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    config = config_of(tmp_path / "out", model_name_or_path=str(tmp_path / "model"), method=["fastv"], limit=4)
    evaluate(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"other settings \(weights: was"):
        evaluate(config)


def test_a_dry_run_tells_what_there_is_to_run(own_data, tmp_path, capsys):
    options = ["custom.metric=exact_match", "custom.split=train"]
    given = {"task": ["custom"], "dataset_path": [own_data], "task_option": options, "seeds": [0], "keep": []}
    config = config_of(tmp_path / "out", method=["fastv"], **given, budget=[32.0], limit=0, dry_run=True)
    assert evaluate(config) is None
    shown = capsys.readouterr().out
    assert "custom: 24 samples; visual tokens per sample: p5 64, p50 64, p95 64" in shown and "; 2 runs over" in shown
    assert "fastv, budget 32: " in shown and "on one process" in shown
    assert not (tmp_path / "out" / "settings.json").exists()


def test_every_sample_is_read_before_the_model_is_asked(own_data, tmp_path, monkeypatch):
    (tmp_path / "23.png").write_bytes((tmp_path / "23.png").read_bytes()[:200])
    monkeypatch.setattr("training.evaluation.runner.answer_timed", refuse)
    given = {"task": ["custom"], "dataset_path": [own_data], "task_option": ["custom.metric=exact_match"]}
    config = config_of(tmp_path / "out", **given, limit=0)
    with pytest.raises(ValueError, match="row 23: column 'image' is not a readable image"):
        evaluate(config)


@pytest.mark.parametrize("what", CHANGES)
def test_training_on_changed_samples_is_not_resumed(own_data, tmp_path, what, monkeypatch):
    given = {"task": "custom", "dataset_path": own_data, "metric": "exact_match", "train_size": 24, "iterations": 2}
    small = {"rollout_size": 8, "minibatch_size": 8, "eval_every": 0, "device": "cpu", "stage_layers": LAYERS}
    config = PPOConfig(output_dir=str(tmp_path / "run"), resume="auto", **given, **small)
    main(config)
    before = files_in(tmp_path / "run" / "checkpoints")
    CHANGES[what](tmp_path)
    monkeypatch.setattr(data_module, "answer", refuse)
    with pytest.raises(ValueError, match=r"iteration_000002 was made with other .*samples: was .*--overwrite"):
        main(config)
    assert files_in(tmp_path / "run" / "checkpoints") == before


def test_a_module_that_an_own_method_imports_is_a_part_of_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "weights_of_mine.py").write_text("FACTOR = 2\n")
    (tmp_path / "another_file.py").write_text("FACTOR = 2\n")
    file = tmp_path / "my_file.py"
    file.write_text("import weights_of_mine\n" + OWN_METHOD)
    method = method_of(f"{file}:Brightest")
    before = code_facts([method])
    assert set(before) == {*fingerprint.LIBRARY, str(file)}
    (tmp_path / "another_file.py").write_text("FACTOR = 3\n")
    assert code_facts([method]) == before
    (tmp_path / "weights_of_mine.py").write_text("FACTOR = 3\n")
    assert code_facts([method_of(f"divprune+{file}:Brightest")]) != before
    assert code_facts() == {name: before[name] for name in fingerprint.LIBRARY}


def test_a_changed_library_makes_results_again(tmp_path, monkeypatch, capsys):
    flags = "cliff --task ocr count --size 4 --workers 0".split()
    flags += ["--output_dir", str(tmp_path / "page"), "--work_dir", str(tmp_path / "work")]
    reproduce.main(flags)
    reproduce.main(flags)
    assert "is there already" in capsys.readouterr().out
    jobs = set((tmp_path / "work" / "jobs").glob("*.json"))
    monkeypatch.setattr("training.analyses.lab.code_facts", lambda: {"training": "another"})
    reproduce.main(flags)
    assert "made_with.code.training: was" in capsys.readouterr().out
    assert len(set((tmp_path / "work" / "jobs").glob("*.json")) - jobs) == len(jobs)


def test_contents_of_data_sets_are_a_part_of_results(own_data, tmp_path, monkeypatch):
    monkeypatch.setitem(reproduce.BENCHMARKS, "custom", factory.custom_spec("train", "exact_match"))
    config = reproduce.ReproduceConfig(task=["custom", "ocr"], seeds=[0], dataset_path=[f"custom={own_data}"])
    monkeypatch.setattr(reproduce, "make_task", lambda *given: factory.make_task(*given, metric="exact_match"))
    before = reproduce.contents_of(config)
    assert set(before) == {"custom/train/0"}
    change_a_pixel(tmp_path)
    after = reproduce.contents_of(config)
    assert after != before
    assert Lab(tmp_path, 0, before).made_with != Lab(tmp_path, 0, after).made_with
