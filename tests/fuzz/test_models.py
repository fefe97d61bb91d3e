"""attach and generate with any schedule and method, damaged policy folders, extreme images, many attachments."""

from __future__ import annotations

import functools
import gc
import json
import math
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save

from tests.fuzz.cases import CASES, outcome, share
from toprl_models import (
    METHODS,
    FastV,
    Pruner,
    RandomPolicy,
    Schedule,
    TopRLPolicy,
    attach,
    method_of,
    schedule_for,
    tiny,
)

LAYERS = st.one_of(st.integers(-1, 7), st.sampled_from([2**70, True, 1.0, "2", None]))
KEEPS = st.one_of(
    st.floats(0, 1), st.integers(0, 70), st.sampled_from([-1, 1.5, math.nan, math.inf, True, "all", None])
)
NAMES = st.sampled_from([*(name for name, method in METHODS.items() if not method.trained), "", "nothing", 3, None])


@functools.cache
def loaded() -> tuple[Any, Any]:
    return tiny.load()


@functools.cache
def inputs() -> dict[str, Any]:
    return inputs_of(Image.effect_noise((128, 128), 90).convert("RGB"))


def inputs_of(image: Image.Image) -> dict[str, Any]:
    _, processor = loaded()
    return processor(images=image, text=tiny.prompt("which digit is in the picture ?"), return_tensors="pt")


@functools.cache
@torch.no_grad()
def unpruned() -> torch.Tensor:
    return loaded()[0](**inputs()).logits


def hooks(model: torch.nn.Module) -> int:
    """Everything that an attachment may leave behind."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    registered = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return registered + sum(name in vars(module) for module in model.modules() for name in ("forward", "generate"))


@share(4)
@given(st.data())
def test_pruned_as_asked_or_refused(data: st.DataObject) -> None:
    (model, _), want = loaded(), unpruned()
    before = hooks(model)  # transformers' own
    name = data.draw(NAMES, "method")
    stages = data.draw(st.lists(st.tuples(LAYERS, KEEPS), max_size=3), "stages")
    mode = data.draw(st.sampled_from(["compact", "compact", "mask", "both", None]), "mode")
    keep = data.draw(KEEPS, "keep") if data.draw(st.booleans()) else None

    def prepare() -> Pruner:
        schedule = Schedule(tuple(stages)) if keep is None else schedule_for(model, name, keep=keep)
        return attach(model, method_of(name).make(), schedule=schedule, mode=mode)

    pruner, refusal = outcome(prepare)
    if refusal:
        assert len(refusal) > 20 and hooks(model) == before
        return
    with pruner, torch.no_grad():
        output, refusal = outcome(lambda: model(**inputs()))
        if refusal:  # what only a prompt tells: a stage that keeps more tokens than it has
            assert "token" in refusal
        else:
            assert output.logits.isfinite().all()
            counts = [trace.counts[0] for trace in pruner.trace]
            assert len(counts) == len(pruner.schedule.stages) and counts == sorted(counts, reverse=True)
            assert model.generate(**inputs(), max_new_tokens=2, do_sample=False).shape[1] > 2
    assert hooks(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, want)


@functools.cache
def policy_files() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        TopRLPolicy(tiny.HIDDEN_SIZE, [1, 2], actor_size=8).save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.suffix != ".md"}


def damaged(draw: Any, name: str, content: bytes) -> bytes:
    """A file that is cut, changed, replaced, or honest but of something else."""
    way = draw(st.sampled_from(["cut", "change", "replace", "pickle", "other"]), "damage")
    place = draw(st.integers(0, len(content) - 1), "place")
    if way == "cut":
        return content[:place]
    if way == "change":
        return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place + 8 :]
    if way == "replace":
        return draw(st.binary(max_size=64))
    if way == "pickle":
        return pickle.dumps({"head.bias": [1.0]})
    if name.endswith(".json"):
        config = json.loads(content)
        key = draw(st.sampled_from(sorted(config)))
        values = [None, -1, 0, 2**70, 1.5, "", "../../etc/passwd", [], [3, 1], {}, True]
        return json.dumps(config | {key: draw(st.sampled_from(values), key)}).encode()
    tensors = load(content)
    return save(tensors | {draw(st.sampled_from(["extra", "../head.bias", "head.bias"])): torch.full((3,), math.nan)})


@share(14)
@given(st.data())
def test_damaged_policy_folders(data: st.DataObject) -> None:
    files = dict(policy_files())
    name = data.draw(st.sampled_from(sorted(files)), "file")
    files[name] = damaged(data.draw, name, files[name])
    with TemporaryDirectory() as folder:
        for file, content in files.items():
            Path(folder, file).write_bytes(content)
        policy, refusal = outcome(lambda: TopRLPolicy.from_pretrained(folder))
        if refusal:
            assert folder in refusal or "TopRLPolicy" in refusal, refusal
            return
        model, _ = loaded()
        outcome(lambda: attach(model, policy, schedule=Schedule(((1, 0.5), (2, 0.5)))).detach())


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (7500, 6700)])
def test_extreme_images(size: tuple[int, int]) -> None:
    model, _ = loaded()
    with attach(model, FastV(), schedule=Schedule(((2, 8),))) as pruner, torch.no_grad():
        assert model(**inputs_of(Image.new("RGB", size, "red"))).logits.isfinite().all()
    assert pruner.trace[0].counts == (8,)


def test_many_attachments_leave_nothing() -> None:
    model, _ = loaded()

    def cycle() -> None:
        with attach(model, RandomPolicy(), schedule=Schedule(((1, 0.5), (2, 4)))):
            model.generate(**inputs(), max_new_tokens=2, do_sample=False)

    for _ in range(5):
        cycle()
    gc.collect()
    before, own = len(gc.get_objects()), hooks(model)
    for _ in range(max(CASES // 20, 20)):
        cycle()
    gc.collect()
    assert len(gc.get_objects()) <= before + 50
    assert hooks(model) == own
