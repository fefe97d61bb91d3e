"""Attached models that are saved, copied, moved, wrapped by PEFT, dispatched by accelerate or quantised."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.agreement import (
    MIXED,
    assert_agreement,
    attached,
    expected_counts,
    fitting,
    kept_slots,
    last_states,
    modes_of,
    run,
    schedule_of,
)
from tests.models.by_hand import by_hand
from tests.models.conftest import HashPolicy
from tests.models.features import CLASSES, feature
from tests.models.test_outputs import MODES, shared_model
from tests.models.tiny_families import HIDDEN_SIZE, build_inputs, build_model
from toprl_models import FastV, Policy, PyramidDrop, Schedule, TopRLPolicy, attach
from toprl_models.probe import decoder_of
from toprl_models.runtime.outputs import without_dropped

HANDLING = feature("save_pretrained, deepcopy, pickle, to()")


def policies(model: Any, schedule: Schedule) -> list[tuple[Policy, Schedule]]:
    """Those that look at weights or states, with stages that fit."""
    learned = TopRLPolicy(HIDDEN_SIZE, list(schedule.layers), 8)
    return [(one, fitting(model, one, schedule)) for one in (FastV(), PyramidDrop(positions="original"), learned)]


def answer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model.generate(**inputs, max_new_tokens=6, do_sample=False)


# --- saving, copying, moving ---


@HANDLING
@pytest.mark.parametrize("mode", MODES)
def test_save_pretrained_saves_the_plain_model(family: str, mode: str, tmp_path: Path) -> None:
    model, inputs = shared_model(family), build_inputs(family, MIXED)
    if mode not in modes_of(model):
        return
    plain = model(**inputs).logits
    model.save_pretrained(tmp_path / "plain")
    with attached(model, schedule_of(family), mode):
        pruned = model(**inputs).logits
        model.save_pretrained(tmp_path / "attached")
        names = set(model.state_dict())
    assert names == set(model.state_dict())
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "attached").iterdir())
    for name in files:
        assert (tmp_path / "attached" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "attached")
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(loaded(**inputs).logits[valid], plain[valid], atol=1e-4, rtol=1e-4)
    assert (pruned - plain)[:, -1].abs().max() > 0.1


@HANDLING
@pytest.mark.parametrize("mode", MODES)
def test_copies_of_an_attached_model_are_refused(family: str, mode: str) -> None:
    model, inputs = build_model(family), build_inputs(family, MIXED)
    if mode not in modes_of(model):
        return
    plain = model(**inputs).logits
    copies = (copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO()))
    with attached(model, schedule_of(family), mode) as pruner:
        pruned = model(**inputs).logits
        for make in (*copies, lambda _: copy.copy(pruner), lambda _: copy.deepcopy(model.get_decoder())):
            with pytest.raises(RuntimeError, match=r"cannot be copied or pickled while .* detach\(\) first"):
                make(model)
        assert torch.equal(model(**inputs).logits, pruned)
    twin = copy.deepcopy(model)
    unused = build_model(
        family
    )  # output recorders of transformers, which a first pass leaves behind, are not picklable
    attached(unused, schedule_of(family), mode).detach()
    again = pickle.loads(pickle.dumps(unused))
    with attached(twin, schedule_of(family), mode):  # the copy is a model of its own
        assert torch.equal(twin(**inputs).logits, pruned)
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(again(**inputs).logits, plain)


@HANDLING
@pytest.mark.parametrize("mode", MODES)
def test_an_attached_model_changes_its_dtype(family: str, mode: str) -> None:
    schedule, inputs = schedule_of(family), build_inputs(family, MIXED)
    before = build_model(family)
    if mode not in modes_of(before):
        return
    coarse = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    rounded = copy.deepcopy(before).to(torch.bfloat16)
    expected = run(copy.deepcopy(rounded).float(), inputs, schedule, mode)
    model = copy.deepcopy(before)
    with attached(model, schedule, mode) as pruner:
        model.to(torch.bfloat16)
        assert model(**coarse).logits.dtype == torch.bfloat16
        assert [stage.counts for stage in pruner.trace] == expected_counts(inputs, schedule)
        model.float()  # the weights are rounded, all else is as it was
        assert torch.equal(answer(model, inputs)[:, -6:], expected.tokens[:, :6])
        torch.testing.assert_close(last_states(model, **inputs), expected.states)
    for policy, stages in policies(model, schedule):
        with attach(model, policy, schedule=stages, mode=mode) as pruner:
            model.to(torch.bfloat16)(**coarse)
            assert [stage.counts for stage in pruner.trace] == expected_counts(inputs, stages)


# --- PEFT ---


def with_lora(model: Any, mean: float = 0.0) -> Any:
    """LoRA on the decoder's projections; ``mean`` moves its second matrix away from its initial zeros."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    target = r".*(language|text)_model.*\.(q_proj|v_proj|down_proj)"
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=target))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(mean, 0.1)
    return wrapped


@feature("PEFT")
def test_a_peft_model_is_attached_by_its_base_model(family: str) -> None:
    schedule, inputs = schedule_of(family), build_inputs(family, MIXED)
    model = with_lora(build_model(family)).eval()
    with pytest.raises(TypeError, match=r"model is a Peft.*pass model\.get_base_model\(\)"):
        attach(model, HashPolicy(), schedule=schedule)
    base = model.get_base_model()
    with_adapter = assert_agreement(base, inputs, schedule)
    plain, unpruned = build_model(family)(**inputs).logits, model(**inputs).logits
    with attached(base, schedule) as pruner:
        # through the wrapper
        assert torch.equal(answer(model, inputs)[:, -6:], with_adapter.tokens[:, :6])
        logits = model(**inputs).logits
        assert (logits - unpruned)[:, -1].abs().max() > 0.1
        assert [stage.counts for stage in pruner.trace] == expected_counts(inputs, schedule)
        with model.disable_adapter():
            without = model(**inputs).logits
    assert torch.equal(model(**inputs).logits, unpruned)
    assert (unpruned - plain)[:, -1].abs().max() > 0.1
    with attached(build_model(family), schedule) as pruner:
        torch.testing.assert_close(pruner.model(**inputs).logits, without, atol=1e-4, rtol=1e-4)


@feature("PEFT")
def test_lora_may_come_after_the_pruner(family: str) -> None:
    """Adapters that are added to an attached model, merged and unloaded again."""
    schedule, inputs = schedule_of(family), build_inputs(family, MIXED)
    base = build_model(family)
    expected = run(with_lora(build_model(family)).eval().get_base_model(), inputs, schedule)
    with attached(base, schedule) as pruner:
        model = with_lora(base).eval()
        assert torch.equal(answer(model, inputs)[:, -6:], expected.tokens[:, :6])
        merged = model.merge_and_unload()
        assert merged is base
        torch.testing.assert_close(last_states(merged, **inputs), expected.states, atol=1e-3, rtol=1e-3)
        assert [stage.counts for stage in pruner.trace] == expected_counts(inputs, schedule)


@feature("PEFT")
def test_lora_is_trained_on_the_surviving_tokens(family: str) -> None:
    """Loss and gradients through the wrapper are the same in both modes, and other than without pruning."""
    inputs = build_inputs(family, MIXED[:2])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    gradients: dict[str | None, dict[str, Tensor]] = {}
    gone = torch.zeros_like(labels, dtype=torch.bool)
    for mode in (None, *MODES):
        model = with_lora(build_model(family)).train()
        base, schedule, answers = model.get_base_model(), schedule_of(family), labels
        if mode is None:
            pruning: Any = contextlib.nullcontext()
        elif mode in modes_of(base):
            pruning = attached(base, schedule, mode)
        else:  # a hand does not take dropped tokens out of the labels
            pruning, answers = by_hand(base, schedule), without_dropped(gone, labels)
        with pruning as pruner:
            # PEFT calls forward() of the model, not the model, so hooks of the outermost module do not run
            model(**inputs, labels=answers).loss.backward()
        if mode == "compact":
            gone = ~kept_slots(inputs, pruner.trace[-1])
        gradients[mode] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients["compact"].keys() == gradients["mask"].keys() == gradients[None].keys()
    for name, gradient in gradients["compact"].items():
        torch.testing.assert_close(gradient, gradients["mask"][name], atol=1e-4, rtol=1e-3, msg=name)
    assert max((gradients["compact"][name] - gradients[None][name]).abs().max() for name in gradients[None]) > 0.05


# --- accelerate ---


def dispatched(model: Any, folder: Path) -> Any:
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


@functools.cache
def runs_offloaded(family: str) -> bool:
    """Tell whether an unattached model runs with all of it offloaded.

    Some call methods, or read weights of other modules, that accelerate's hooks of forward() have left on "meta".
    """
    from accelerate import cpu_offload

    model = build_model(family)
    cpu_offload(model, "cpu")
    try:
        answer(model, build_inputs(family))
    except RuntimeError:
        return False
    return True


def offloadable(model: Any) -> Any:
    """All of the model, or its decoder."""
    family = next(name for name, one in CLASSES.items() if one is type(model))
    return model if runs_offloaded(family) else model.get_decoder()


def offloaded_to_memory(model: Any, folder: Path) -> Any:
    from accelerate import cpu_offload

    cpu_offload(offloadable(model), "cpu")
    return model


def offloaded_to_disk(model: Any, folder: Path) -> Any:
    from accelerate import disk_offload

    disk_offload(offloadable(model), str(folder), "cpu")
    return model


@feature("accelerate hooks")
@pytest.mark.parametrize(
    ("wrap", "mode"),
    [
        (dispatched, "compact"),
        (dispatched, "mask"),
        (offloaded_to_memory, "compact"),
        (offloaded_to_memory, "mask"),
        (offloaded_to_disk, "compact"),
    ],
)
def test_hooks_of_accelerate_come_before_or_behind(family: str, wrap: Any, mode: str, tmp_path: Path) -> None:
    if mode not in modes_of(shared_model(family)):
        return
    schedule, inputs = schedule_of(family), build_inputs(family, MIXED)
    expected = run(shared_model(family), inputs, schedule, mode)
    first = wrap(build_model(family), tmp_path / "first")
    found = run(first, inputs, schedule, mode)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.states, expected.states)
    assert any(hasattr(module, "_hf_hook") for module in decoder_of(first).modules())
    assert wrap is dispatched or next(first.get_decoder().parameters()).device.type == "meta"
    later = build_model(family)
    with attached(later, schedule, mode) as pruner:
        later = wrap(later, tmp_path / "later")
        torch.testing.assert_close(last_states(later, **inputs), expected.states)
        assert [stage.counts for stage in pruner.trace] == expected_counts(inputs, schedule)
    for policy, stages in policies(first, schedule):
        with attach(first, policy, schedule=stages, mode=mode) as pruner:
            first(**inputs)
        scores = [stage.scores for stage in pruner.trace]
        with attach(shared_model(family), policy, schedule=stages, mode=mode) as pruner:
            pruner.model(**inputs)
        for one, other in zip(scores, pruner.trace, strict=True):
            torch.testing.assert_close(one, other.scores)


@feature("accelerate hooks")
def test_device_map_of_from_pretrained(family: str, tmp_path: Path) -> None:
    schedule, inputs = schedule_of(family), build_inputs(family, MIXED)
    original = shared_model(family)
    original.save_pretrained(tmp_path)
    model = type(original).from_pretrained(tmp_path, device_map="cpu")
    model.generation_config = original.generation_config
    found, expected = run(model, inputs, schedule), run(original, inputs, schedule)
    assert torch.equal(found.tokens, expected.tokens)
    assert [stage.counts for stage in found.trace] == expected_counts(inputs, schedule)


# --- 8-bit weights ---


class Int8Linear(nn.Module):
    """What quantisers put in place of ``nn.Linear``: int8 weights with a scale per row, no floating ``weight``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.weight.to(states.dtype) * self.scale, self.bias)


def in_8_bit(model: Any) -> Any:
    for module in list(decoder_of(model).modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:  # a router is a Linear that returns more
                setattr(module, name, Int8Linear(child))
    return model


@feature("8-bit weights")
def test_weights_in_8_bit(family: str) -> None:
    schedule, inputs = schedule_of(family), build_inputs(family, MIXED)
    model = in_8_bit(build_model(family))
    quantised = assert_agreement(model, inputs, schedule)
    exact = run(shared_model(family), inputs, schedule)
    assert (quantised.states - exact.states).abs().max() > 1e-3
    for policy, stages in policies(model, schedule):
        with attach(model, policy, schedule=stages) as pruner:
            answer(model, inputs)
        assert [stage.counts for stage in pruner.trace] == expected_counts(inputs, stages)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """accelerate warns about every parameter that it offloads."""
    logging.getLogger("accelerate").setLevel(logging.ERROR)
