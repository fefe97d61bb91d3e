"""Any task, any family: training on pictures of one's own, for tiny random models of every supported family."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny_families import (
    FAMILY_NAMES,
    HIDDEN_SIZE,
    IMAGE_ID,
    PAD_ID,
    TINY,
    build_inputs,
    build_model,
    visual_mask,
)
from tests.training.any_family import BOXES, WORDS, processor, write_data
from tests.training.tables import write_jsonl
from toprl_models import Schedule, TopRLPolicy
from training import ppo
from training.metrics import parse_box
from training.ppo import PPOConfig, main
from training.rollout import Rollout, rollout
from training.tasks import Task, answer, encode, load_model, make_task
from training.trainer.data import TrainingData
from training.trainer.episodes import concatenate
from training.trainer.features import FeatureCache, collate, encode_features

LAYERS = [2, 4]
ROWS = 6
# float32 rounding of the same sums in another order, of states around 1
ATOL = 2e-4


def own_task(folder: Path, metric: str = "exact_match") -> Task:
    return make_task("custom", "train", ROWS, dataset_path=str(folder / "train.jsonl"), metric=metric)


def teach(folder: Path, model: Any, reader: Any, metric: str = "exact_match") -> None:
    """Write pictures of different sizes with questions, and as references what the unpruned model answers itself."""
    path = write_data(folder, ROWS)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if metric == "iou":
        rows = [row | {"bbox": [0.1, 0.1, 0.9, 0.9]} for row in rows]
        write_jsonl(path, rows)
    task = own_task(folder, metric)
    samples = [task[i] for i in range(ROWS)]
    texts, _ = answer(model, reader, task, samples, encode(reader, task, samples, "cpu"))
    if metric == "iou":
        boxes = [parse_box(text) for text in texts]
        rows = [row | {"bbox": box} for row, box in zip(rows, boxes, strict=True)]
    else:
        rows = [row | {"answer": text} for row, text in zip(rows, texts, strict=True)]
    write_jsonl(path, rows)


def config(folder: Path, **changes: Any) -> PPOConfig:
    values = {
        "output_dir": str(folder / "run"),
        "task": "custom",
        "dataset_path": str(folder / "train.jsonl"),
        "metric": "exact_match",
        "train_size": ROWS,
        "stage_layers": LAYERS,
        "iterations": 2,
        "rollout_size": 4,
        "minibatch_size": 2,
        "ppo_epochs": 1,
        "actor_size": 8,
        "eval_every": 0,
        "device": "cpu",
    }
    return PPOConfig(**(values | changes))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@functools.cache
def parts_of(family: str) -> tuple[Any, Any]:
    """One model and processor for all tests that leave them as they are."""
    return build_model(family), processor(family)


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """TrainingData of one file: a function of the cache's size and depth."""
    folder = write_data(tmp_path_factory.mktemp("data"), ROWS).parent

    def make(megabytes: float = 64, depth: int = 0) -> TrainingData:
        task = own_task(folder)
        samples = [task[i] for i in range(ROWS)]
        return TrainingData(task, samples, torch.ones(ROWS), FeatureCache(megabytes, depth))

    return make


def episodes_of(family: str, data: TrainingData, rows: list[int], mode: str = "compact") -> Rollout:
    model, reader = parts_of(family)
    torch.manual_seed(0)
    policy = TopRLPolicy(HIDDEN_SIZE, LAYERS, 8, keep_bias=0.0)
    return rollout(
        model,
        reader,
        policy,
        Schedule(tuple((layer, 1.0) for layer in LAYERS)),
        data.task,
        [data.samples[row] for row in rows],
        data.inputs(model, reader, rows),
        episodes=torch.tensor(rows),
        seed=3,
        tau=1.0,
        mode=mode,
    )


@pytest.mark.parametrize(
    ("family", "dtype"), [*((f, "float32") for f in FAMILY_NAMES), ("llava", "bfloat16"), ("qwen2_5_vl", "bfloat16")]
)
def test_training_on_own_pictures(family, dtype, tmp_path, monkeypatch):
    """Rows of one and two pictures of different sizes, answers of many tokens."""
    model, reader = build_model(family).to(getattr(torch, dtype)), processor(family)
    teach(tmp_path, model, reader)
    monkeypatch.setattr(ppo, "load_model", lambda *_, **__: (model, reader))
    policy = TopRLPolicy.from_pretrained(main(config(tmp_path, dtype=dtype)))
    rows = rows_of(tmp_path)
    assert len(rows) == 2
    assert all(0 < row["retained"][1] < row["retained"][0] < 1 for row in rows)
    if dtype == "float32":  # references come from a batch, Q from features of single samples: bfloat16 rounds apart
        assert rows[0]["usable"] == 1
    assert policy.head.bias.tolist() != [1.5, 0.0]  # it learned
    policy.check(model, Schedule(tuple((layer, 1.0) for layer in LAYERS)))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_masked_and_compacted_rollouts_are_the_same_episode(family, data_of):
    data, rows = data_of(), [0, 1, 4, 3]
    compact, mask = (episodes_of(family, data, rows, mode) for mode in ("compact", "mask"))
    assert torch.equal(compact.retained, mask.retained)
    assert compact.answers == mask.answers
    assert 0.1 < compact.retained[:, -1].mean() < 0.5
    for short, full in zip(compact.steps, mask.steps, strict=True):
        for row in range(len(rows)):
            here, there = short.valid_mask[row], full.valid_mask[row]
            assert torch.equal(short.keep_mask[row, here], full.keep_mask[row, there])
            torch.testing.assert_close(short.log_prob[row, here], full.log_prob[row, there], atol=ATOL, rtol=0)


@pytest.mark.since("5.23")
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_features_stand_for_pixels(family, data_of):
    """A batch from the cache is the batch that the processor makes, up to rounding, whatever the cache held before."""
    (model, reader), data, rows = parts_of(family), data_of(), [0, 1, 4, 5]
    plain, cached = data_of(0).inputs(model, reader, rows), data.inputs(model, reader, rows)
    assert "mm_encoder_outputs" in cached and not any(name.startswith("pixel_values") for name in cached)
    assert len(data.features) == len(rows)
    for name in plain.keys() & cached.keys():
        assert torch.equal(plain[name], cached[name]), name
    with torch.no_grad():
        ours, theirs = (model.base_model(**inputs).last_hidden_state for inputs in (cached, plain))
        torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=1e-4)
        other = data_of()
        other.inputs(model, reader, [5, 2, 1])
        warm, full = other.inputs(model, reader, rows), data_of(1e-6).inputs(model, reader, rows)
        for inputs in (warm, full):
            assert torch.equal(model.base_model(**inputs).last_hidden_state, ours)


@pytest.mark.since("5.23")
@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if TINY[name].video])
def test_features_of_videos(family):
    """Two videos, and one beside an image, in one batch: each row as if it was alone."""
    model, _ = parts_of(family)
    alone = [build_inputs(family, (row,), seed) for seed, row in enumerate((("video",), ("image",), ("video",)))]
    batch = collate([encode_features(model, inputs) for inputs in alone], PAD_ID, "cpu")
    together = model.base_model(**batch).last_hidden_state
    assert batch["input_ids"].shape[1] == max(inputs["input_ids"].shape[1] for inputs in alone)
    for row, inputs in enumerate(alone):
        expected = model.base_model(**inputs).last_hidden_state[0]
        assert visual_mask(inputs).any()
        torch.testing.assert_close(together[row, -len(expected) :], expected, atol=ATOL, rtol=1e-4)


@pytest.mark.since("5.23")
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_layers_before_the_first_stage_run_once(family, data_of):
    """Rollouts that take them from the cache are the same episodes, in both modes, and the layers are left alone."""
    (model, reader), rows = parts_of(family), [0, 1, 4, 3]
    data, layers = data_of(depth=LAYERS[0]), list(model.get_decoder().layers)
    data.features.plan(model, reader, data.task, data.samples)
    assert data.features.depth == LAYERS[0]
    plain = episodes_of(family, data_of(), rows)
    asked = []
    handles = [layer.self_attn.register_forward_hook(lambda *_: asked.append(1)) for layer in layers[: LAYERS[0]]]
    for mode in ("compact", "mask"):
        data.inputs(model, reader, rows)
        asked.clear()
        with data.skipping(model, reader, rows):
            found = episodes_of(family, data, rows, mode)
        assert len(asked) == LAYERS[0] * (data.task.max_new_tokens - 1)  # no prefill
        assert found.answers == plain.answers and torch.equal(found.retained, plain.retained)
        if mode == "compact":
            for one, other in zip(found.steps, plain.steps, strict=True):
                assert torch.equal(one.keep_mask, other.keep_mask)
                torch.testing.assert_close(one.log_prob, other.log_prob, atol=ATOL, rtol=0)
                here = one.valid_mask
                torch.testing.assert_close(one.hidden_states[here], other.hidden_states[here], atol=ATOL, rtol=1e-4)
    for handle in handles:
        handle.remove()
    assert list(model.get_decoder().layers) == layers and not any("forward" in vars(layer) for layer in layers)
    other = data_of(depth=LAYERS[0])
    other.inputs(model, reader, [3, 5, 0])
    for row in rows:
        ours, theirs = (one.features.encoded(model, reader, one.task, one.samples[row]).prefix for one in (data, other))
        assert torch.equal(ours.states, theirs.states) and torch.equal(ours.keys[1], theirs.keys[1])


@pytest.mark.since("5.23")
def test_prefixes_are_kept_if_all_fit(data_of):
    (model, reader), data = parts_of("llava"), data_of(0.1, LAYERS[0])
    data.features.plan(model, reader, data.task, data.samples)
    assert data.features.depth == 0 and data.features.encoded(model, reader, data.task, data.samples[0]).prefix is None


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl"])
def test_a_rollout_in_parts(family, data_of):
    """Parts of different widths, put together, are the rollout of the whole batch."""
    data, rows = data_of(), [0, 1, 2, 3, 4]
    whole = episodes_of(family, data, rows)
    joined = concatenate([episodes_of(family, data, part) for part in ([0, 1], [2], [3, 4])])
    assert joined.answers == whole.answers
    assert torch.equal(joined.retained, whole.retained) and torch.equal(joined.quality, whole.quality)
    widths = set()
    for one, other in zip(joined.steps, whole.steps, strict=True):
        widths.add(one.valid_mask.shape)
        assert torch.equal(one.valid_mask, other.valid_mask) and torch.equal(one.keep_mask, other.keep_mask)
        for name in ("log_prob", "value", "text_state", "kept_fraction"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=ATOL, rtol=1e-4)
        here = one.valid_mask
        torch.testing.assert_close(one.hidden_states[here], other.hidden_states[here], atol=ATOL, rtol=1e-4)
    assert len(widths) == len(LAYERS)


def test_parts_of_different_stages_are_refused(data_of):
    one = episodes_of("llava", data_of(), [0])
    two = replace(one, steps=one.steps[:1])
    with pytest.raises(ValueError, match=r"rollouts have \[2, 1\] stages"):
        concatenate([one, two])
    with pytest.raises(ValueError, match="rollouts is empty"):
        concatenate([])


@pytest.mark.parametrize(("metric", "words"), [("bleu", WORDS), ("cider", WORDS), ("iou", BOXES)])
def test_metrics_of_whole_answers_as_reward(metric, words, tmp_path, monkeypatch):
    """A pruned answer is worth something between nothing and the unpruned one."""
    model, reader = build_model("llava"), processor("llava", words)
    teach(tmp_path, model, reader, metric)
    monkeypatch.setattr(ppo, "load_model", lambda *_, **__: (model, reader))
    main(config(tmp_path, metric=metric))
    rows = rows_of(tmp_path)
    assert rows[0]["usable"] == 1
    assert all(0 < row["accuracy"] < 1 for row in rows)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_model_from_a_folder(family, tmp_path):
    """Model and processor as ``save_pretrained`` leaves them; other processors cannot be loaded without torchvision."""
    model, reader = build_model(family), processor(family)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    reader.save_pretrained(folder)
    loaded, loaded_reader = load_model(str(folder), "cpu", torch.float32, "eager")
    assert loaded.config.get_text_config()._attn_implementation == "eager"
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded_reader.tokenizer.padding_side == "left" and loaded_reader.image_token_id == IMAGE_ID
    teach(tmp_path, loaded, loaded_reader)
    main(config(tmp_path, model_name_or_path=str(folder)))
    assert rows_of(tmp_path)[0]["usable"] == 1
