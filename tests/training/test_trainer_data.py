"""Training data: Q measured once and kept on disk, inputs of batches, wall time by phase."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from toprl_models import tiny
from training.tasks import encode, make_task
from training.trainer import data as data_module
from training.trainer.data import FeatureCache, TrainingData, identity_of, measured, pad_token_of, training_data
from training.trainer.profile import Phases
from training.trainer.quality_cache import column_path, measure_once, read_column
from training.trainer.ranks import Ranks

SIZE, BATCH = 20, 8


@pytest.fixture(scope="module")
def model_and_processor():
    return tiny.load()


@pytest.fixture(scope="module")
def task():
    return make_task("colour", "train", SIZE)


def cached(model_and_processor, task, folder, batch_size=BATCH):
    return training_data(*model_and_processor, task, batch_size, cache_dir=folder)


def refuse(*_: Any) -> Any:
    raise AssertionError("the model was asked")


# -- Q on disk -----------------------------------------------------------------------------------------------------


def test_q_is_measured_once(model_and_processor, task, tmp_path, monkeypatch):
    first = cached(model_and_processor, task, tmp_path)
    assert 0 < first.quality.mean() < 1
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("quality-")
    before = path.read_bytes()
    assert torch.equal(training_data(*model_and_processor, task, BATCH).quality, first.quality)  # without a folder
    monkeypatch.setattr(data_module, "answer", refuse)
    again = cached(model_and_processor, make_task("colour", "train", SIZE), tmp_path)
    assert torch.equal(again.quality, first.quality)
    assert path.read_bytes() == before


def test_a_killed_pass_goes_on(model_and_processor, task, tmp_path, monkeypatch):
    whole = cached(model_and_processor, task, tmp_path / "whole").quality
    real, asked = data_module.answer, []

    def dies(model, processor, task, samples, inputs):
        asked.append([sample.key for sample in samples])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(model, processor, task, samples, inputs)

    monkeypatch.setattr(data_module, "answer", dies)
    with pytest.raises(KeyboardInterrupt):
        cached(model_and_processor, task, tmp_path / "cut")
    resumed = cached(model_and_processor, task, tmp_path / "cut").quality
    assert torch.equal(resumed, whole)
    assert [len(keys) for keys in asked] == [8, 8, 8, 4]  # the first batch was not asked again
    assert asked[2] == asked[1]
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "cut")]
    assert names[0] == names[1]  # nothing else is left behind


def changed_question(task):
    samples = [task[i] for i in range(SIZE)]
    samples[7] = samples[7]._replace(question=samples[7].question + " ?")
    return samples


def changed_picture(task):
    samples = [task[i] for i in range(SIZE)]
    image = samples[7].image.copy()
    image.putpixel((5, 5), (1, 2, 3))
    samples[7] = samples[7]._replace(image=image)
    return samples


def test_what_q_depends_on_is_in_the_name(model_and_processor, task, tmp_path):
    model, processor = model_and_processor
    samples = [task[i] for i in range(SIZE)]

    def name(model=model, processor=processor, task=task, samples=samples, batch_size=BATCH, column="quality"):
        data = TrainingData(task, samples, torch.zeros(SIZE))
        identity = identity_of(model, processor, data, batch_size, column)
        return column_path(tmp_path, column, identity).name

    trained, _ = tiny.load()
    with torch.no_grad():
        for parameter in trained.model.language_model.layers[2].mlp.parameters():
            parameter.mul_(1.001)
    other_sampling, _ = tiny.load()
    other_sampling.generation_config.repetition_penalty = 1.2
    _, smaller = tiny.load()
    smaller.image_processor.image_mean = [0.4] * 3
    _, spoken = tiny.load()
    spoken.chat_template = spoken.chat_template.replace("answer", "so answer")
    eager, _ = tiny.load()
    eager.set_attn_implementation("eager")
    names = [
        name(),
        name(model=trained),
        name(model=other_sampling),
        name(model=eager),
        name(model=tiny.load(dtype=torch.bfloat16)[0]),
        name(processor=smaller),
        name(processor=spoken),
        name(samples=changed_question(task)),
        name(samples=changed_picture(task)),
        name(samples=samples[:-1]),
        name(task=replace(task, max_new_tokens=3)),
        name(batch_size=BATCH + 1),
        name(column="log_prob"),
    ]
    assert len(set(names)) == len(names)
    assert name(model=tiny.load()[0], processor=tiny.load()[1], task=make_task("colour", "train", SIZE)) == names[0]


@pytest.mark.parametrize("damage", ["cut", "text", "nan", "longer"])
def test_a_corrupt_file_is_named(damage, tmp_path):
    path, identity = tmp_path / "quality-0.safetensors", {"data": "a"}
    measure_once("quality", path, identity, 20, 8, lambda rows: torch.ones(len(rows)), Ranks())
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "text":
        path.write_text("not what it was")
    elif damage == "nan":
        path.unlink()
        measure_once("quality", path, identity, 20, 8, lambda rows: torch.full((len(rows),), torch.nan), Ranks())
    total = 10 if damage == "longer" else 20
    with pytest.raises(ValueError, match=rf"--cache_dir: .*{path.name} is corrupt .*delete it"):
        measure_once("quality", path, identity, total, 8, refuse, Ranks())


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "quality-0.safetensors"
    measure_once("quality", path, {"data": "a", "model": 1}, 4, 4, lambda rows: torch.ones(4), Ranks())
    with pytest.raises(ValueError, match=r"quality-0\.safetensors holds .* something else \(data: was .*delete it"):
        measure_once("quality", path, {"data": "b", "model": 1}, 4, 4, refuse, Ranks())


def test_a_full_disk_leaves_the_last_file(tmp_path, monkeypatch):
    path = tmp_path / "quality-0.safetensors"

    def full(tensors, aside, metadata):
        Path(aside).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    measured_rows = []

    def measure(rows):
        measured_rows.append(rows)
        if len(measured_rows) == 2:
            monkeypatch.setattr("training.trainer.quality_cache.save_file", full)
        return torch.tensor(rows).float()

    with pytest.raises(OSError, match="No space left"):
        measure_once("quality", path, {}, 10, 4, measure, Ranks())
    assert read_column(path, {}, 10).tolist() == [0, 1, 2, 3]
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_another_column(model_and_processor, task, tmp_path):
    """Any number per sample that depends on the unpruned model alone is kept the same way."""
    data = cached(model_and_processor, task, tmp_path)

    def lengths(samples, inputs):
        return inputs["attention_mask"].sum(1)

    model, processor = model_and_processor
    found = measured(model, processor, data, BATCH, "length", lengths, tmp_path)
    assert found.dtype == torch.float32 and found.min() > tiny.NUM_VISUAL_TOKENS
    assert torch.equal(found, measured(model, processor, data, BATCH, "length", refuse, tmp_path))
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["length", "quality"]


@dataclass
class Meeting:
    """What the threads that stand for processes exchange."""

    size: int
    barrier: threading.Barrier = field(init=False)
    table: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=20)

    def exchange(self, rank: int, value: Tensor) -> list[Tensor]:
        self.table[rank] = value.clone()
        self.barrier.wait()
        values = [self.table[one] for one in range(self.size)]
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class Threads(Ranks):
    meeting: Meeting | None = None

    def sum(self, values: Tensor) -> Tensor:
        return torch.stack(self.meeting.exchange(self.rank, values)).sum(0)

    def gather(self, values: Tensor, total: int) -> Tensor:
        parts = self.meeting.exchange(self.rank, values)
        shares = [Ranks(rank, self.size).share(total) for rank in range(self.size)]
        assert [len(part) for part in parts] == [share.stop - share.start for share in shares]
        return torch.cat(parts)


def shared_pass(path: Path, size: int, stop_after: int = 10**6) -> tuple[list[Tensor], list[list[int]]]:
    """measure_once by ``size`` processes; the numbers that each gets and the batches that were measured."""
    meeting, batches = Meeting(size), []
    results: list[Any] = [None] * size

    def measure(rows: list[int]) -> Tensor:
        if len(batches) >= stop_after:
            meeting.barrier.abort()
            raise KeyboardInterrupt
        batches.append(rows)
        return torch.tensor(rows).float() * 0.1 + len(rows)  # depends on the batch, as rounding does

    def work(rank: int) -> None:
        with contextlib.suppress(KeyboardInterrupt, threading.BrokenBarrierError):
            results[rank] = measure_once("quality", path, {"a": 1}, 29, 4, measure, Threads(rank, size, meeting))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, batches


@pytest.mark.parametrize("size", [2, 3, 10])
def test_processes_share_the_work(size, tmp_path):
    (alone,), batches = shared_pass(tmp_path / "alone", 1)
    results, shared = shared_pass(tmp_path / "shared", size)
    assert sorted(shared) == batches
    assert all(torch.equal(one, alone) for one in results)
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "alone").read_bytes()
    again, nothing = shared_pass(tmp_path / "alone", size)  # read by the first, known to all
    assert not nothing and all(torch.equal(one, alone) for one in again)


def test_another_number_of_processes_goes_on(tmp_path):
    (alone,), _ = shared_pass(tmp_path / "alone", 1)
    cut, first = shared_pass(tmp_path / "cut", 2, stop_after=5)
    assert cut == [None, None] and len(first) == 5
    results, rest = shared_pass(tmp_path / "cut", 3)
    assert all(torch.equal(one, alone) for one in results)
    assert len(rest) == 4  # two rounds of two batches were kept


# -- inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.since("5.23")
def test_inputs_do_not_depend_on_the_cache(model_and_processor, task):
    model, processor = model_and_processor
    samples = [task[i] for i in range(SIZE)]
    rows = [3, 17, 3, 0, 9]
    found = []
    for megabytes, before in ((64, []), (64, [9, 17, 1]), (0.1, []), (1e-6, [])):
        data = TrainingData(task, samples, torch.ones(SIZE), FeatureCache(megabytes))
        if before:
            data.inputs(model, processor, before)
        found.append(data.inputs(model, processor, rows))
    kept = [len(torch.cat(inputs["mm_encoder_outputs"]["image"].pooler_output)) for inputs in found]
    assert kept == [len(rows) * tiny.NUM_VISUAL_TOKENS] * 4
    for inputs in found[1:]:
        ours, theirs = (
            torch.stack(list(one["mm_encoder_outputs"]["image"].pooler_output)) for one in (inputs, found[0])
        )
        assert torch.equal(ours, theirs)
        assert torch.equal(inputs["input_ids"], found[0]["input_ids"])


@pytest.mark.since("5.23")
def test_the_cache_stops_when_it_is_full(model_and_processor, task, monkeypatch):
    model, processor = model_and_processor
    samples = [task[i] for i in range(SIZE)]
    data = TrainingData(task, samples, torch.ones(SIZE), FeatureCache(0.1))  # 33 KB a sample
    data.inputs(model, processor, range(SIZE))
    assert len(data.features) == 3 and 0 <= data.features.free < 40_000
    encoded = []
    real = encode
    monkeypatch.setattr("training.trainer.features.encode", lambda *args: encoded.append(args[2][0].key) or real(*args))
    data.inputs(model, processor, [0, 1, 2, 5])
    assert encoded == [samples[5].key]


def test_without_a_cache_pixels_are_passed(model_and_processor, task):
    model, processor = model_and_processor
    samples = [task[i] for i in range(4)]
    data = TrainingData(task, samples, torch.ones(4), FeatureCache(0))
    inputs, expected = data.inputs(model, processor, [2, 0]), encode(processor, task, [samples[2], samples[0]], "cpu")
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_a_release_that_takes_no_features(model_and_processor, task, monkeypatch):
    model, processor = model_and_processor
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, pixel_values, attention_mask: None)
    data = TrainingData(task, [task[0]], torch.ones(1), FeatureCache(64))
    assert "pixel_values" in data.inputs(model, processor, [0])


def test_pixels_without_an_encoder_are_refused(model_and_processor, task):
    from training.trainer.features import encode_features

    model, processor = model_and_processor
    inputs = encode(processor, task, [task[0]], "cpu")
    inputs["pixel_values_depth"] = inputs["pixel_values"]
    with pytest.raises(ValueError, match="no encoder that takes pixel_values_depth; use --feature_cache_mb 0"):
        encode_features(model, inputs)


def test_a_tokenizer_without_a_pad_token():
    _, processor = tiny.load()
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"has no pad token; set processor\.tokenizer\.pad_token"):
        pad_token_of(processor)


# -- phases --------------------------------------------------------------------------------------------------------


def test_phases_add_up(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    phases = Phases()

    def spend(name, seconds, error=False):
        with phases(name):
            now[0] += seconds
            if error:
                raise KeyError

    spend("rollout", 2.0)
    now[0] += 0.5
    spend("update", 1.0)
    spend("rollout", 3.0)
    assert phases.take() == {"rollout": 5.0, "update": 1.0, "other": 0.5}
    spend("update", 4.0)
    assert phases.take() == {"update": 4.0, "other": 0.0}  # anew
    with pytest.raises(KeyError):
        spend("reward", 1.0, error=True)
    with phases("reward"), pytest.raises(RuntimeError, match="'log' begins within 'reward'"), phases("log"):
        pass
    assert phases.take() == {"reward": 1.0, "other": 0.0}
    assert json.loads(json.dumps(phases.take()))
