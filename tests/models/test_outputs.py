"""What a forward pass gives back while a model is pruned: logits, loss, states, attention weights, gradients."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import LlavaForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.models.agreement import keeps_state, last_states, modes_of, schedule_of, single_row
from tests.models.by_hand import by_hand
from tests.models.conftest import HashPolicy
from tests.models.features import feature
from tests.models.generating import generate
from tests.models.tiny_families import build_inputs, build_model, in_float64, tiny_family, visual_mask
from toprl_models import Decision, Policy, Pruner, Schedule, attach
from toprl_models.probe import decoder_of, has_attention

ROWS = (("image",), ("image", "image"), ())
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
MODES = ["compact", "mask"]
# what transformers learned between 5.17 and 5.23
TAKES_FEATURES = "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters
REPEATS_HOOKS = "__call__" in vars(GradientCheckpointingLayer)  # in the backward pass


@functools.cache
def shared_model(family: str, attn_implementation: str = "sdpa") -> Any:
    """One model for all tests that leave it as it was."""
    return build_model(family, attn_implementation)


def alive_at(pruner: Pruner, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """bool [B, N]: the tokens that run through decoder layer ``layer``: text, and what its stages kept."""
    alive = inputs["attention_mask"].bool()
    visual = visual_mask(inputs)
    stages = [stage for stage in pruner.trace if stage.layer <= layer]
    if not stages:
        return alive
    ordinal = visual.cumsum(1) - 1
    rows = zip(ordinal, stages[-1].indices, strict=True)
    kept = torch.stack([torch.isin(row, found[found >= 0]) for row, found in rows])
    return alive & (~visual | kept)


def survivors(pruner: Pruner, inputs: dict[str, Tensor]) -> Tensor:
    """bool [B, N]: the tokens that reach the last layer."""
    return alive_at(pruner, inputs, 10**6)


@feature("logits_to_keep")
@pytest.mark.parametrize("mode", MODES)
def test_logits_to_keep_counts_and_picks_positions_of_the_prompt(family: str, mode: str) -> None:
    model, inputs = shared_model(family), build_inputs(family, ROWS)
    if mode not in modes_of(model):
        return
    plain = model(**inputs).logits
    picked = torch.tensor([0, 7, plain.shape[1] - 1])
    with attach(model, HashPolicy(), schedule=schedule_of(family), mode=mode):
        full = model(**inputs).logits
        last = model(**inputs, logits_to_keep=3).logits
        some = model(**inputs, logits_to_keep=picked).logits
    assert full.shape == plain.shape
    torch.testing.assert_close(last, full[:, -3:], **TOLERANCE)
    torch.testing.assert_close(some, full[:, picked], **TOLERANCE)
    assert (last - plain[:, -3:]).abs().max() > 0.1


def cross_entropy(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Mean over ``counted`` [B, N], the positions whose next token is asked for; an independent computation."""
    scores = logits[:, :-1].double().log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return -scores[counted[:, :-1]].mean().float()


@feature("labels and loss")
@pytest.mark.parametrize("labelled", ["answer", "text", "everything"])
def test_the_loss_leaves_out_what_concerns_dropped_tokens(family: str, labelled: str) -> None:
    model, inputs = shared_model(family), build_inputs(family, ROWS)
    ids, valid, visual = inputs["input_ids"], inputs["attention_mask"].bool(), visual_mask(inputs)
    wanted = {"answer": valid & (torch.arange(ids.shape[1]) >= ids.shape[1] - 3), "text": valid & ~visual}
    labels = ids.masked_fill(~wanted.get(labelled, valid), -100)
    plain = model(**inputs, labels=labels).loss
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    loss, modes = {}, modes_of(model)
    for mode in modes:
        with attach(model, HashPolicy(), schedule=schedule_of(family), mode=mode) as pruner:
            output = model(**inputs, labels=labels)
            alive = survivors(pruner, inputs)
            asked = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
            counted = asked & alive & torch.nn.functional.pad(alive[:, 1:], (0, 1))
            # the test could not fail if no label concerned a dropped token
            assert (counted != asked).any() == (labelled != "answer")
            torch.testing.assert_close(output.loss, cross_entropy(output.logits, labels, counted), **TOLERANCE)
            same = model(**inputs, labels=labels, shift_labels=shifted).loss
            torch.testing.assert_close(same, output.loss, **TOLERANCE)
            summed = model(**inputs, labels=labels, num_items_in_batch=int(counted.sum())).loss
            torch.testing.assert_close(summed, output.loss, **TOLERANCE)
            loss[mode] = output.loss
    torch.testing.assert_close(loss["compact"], loss[modes[-1]], **TOLERANCE)
    assert (loss["compact"] - plain).abs() > 0.005
    torch.testing.assert_close(model(**inputs, labels=labels).loss, plain)


def test_the_models_own_loss_function_is_used_and_put_back() -> None:
    model, inputs = build_model(), build_inputs()
    seen = []

    def own(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        seen.append(labels)
        return logits.sum()

    model.loss_function = own
    with attach(model, HashPolicy(), schedule=schedule_of("llava")) as pruner:
        model(**inputs, labels=inputs["input_ids"])
        with pruner.disabled():
            model(**inputs, labels=inputs["input_ids"])
    assert model.loss_function is own
    # 14 of 16 tokens are dropped; the two that are left and the word behind the image follow dropped ones
    assert [int((labels == -100).sum()) for labels in seen] == [17, 0]
    del model._loss_function
    with attach(model, HashPolicy(), schedule=schedule_of("llava")):
        pass
    assert "_loss_function" not in vars(model)
    with attach(model, HashPolicy(), schedule=schedule_of("llava")):
        model.loss_function = own
    assert model.loss_function is own


def test_labels_that_are_not_one_per_token_are_refused() -> None:
    model, inputs = shared_model("llava"), build_inputs()
    with (
        attach(model, HashPolicy(), schedule=schedule_of("llava")),
        pytest.raises(ValueError, match=r"labels: shape \(1, 3\)"),
    ):
        model(**inputs, labels=inputs["input_ids"][:, -3:], logits_to_keep=3)


@feature("output_hidden_states")
def test_hidden_states_lie_at_the_places_of_the_prompt(family: str) -> None:
    model, inputs = shared_model(family), build_inputs(family, ROWS)
    plain = model(**inputs, output_hidden_states=True).hidden_states
    found, valid, modes = {}, inputs["attention_mask"].bool(), modes_of(model)
    for mode in modes:
        with attach(model, HashPolicy(), schedule=schedule_of(family), mode=mode) as pruner:
            found[mode] = model(**inputs, output_hidden_states=True).hidden_states
            last = last_states(model, **inputs)
            selected = model(**inputs, output_hidden_states=[2, 4]).hidden_states
        assert len(found[mode]) == len(plain)
        torch.testing.assert_close(found[mode][-1], last)
        assert [i for i, states in enumerate(selected) if states is not None] == [2, 4]
        before = len(plain) - len(selected)  # transformers 5.17 leaves the embeddings out of a selection
        for number in (2, 4):
            torch.testing.assert_close(selected[number], found[mode][number + before])
    for number, states in enumerate(found["compact"]):
        assert states.shape == plain[number].shape
        alive = alive_at(pruner, inputs, number - 1)
        torch.testing.assert_close(states[alive], found[modes[-1]][number][alive], **TOLERANCE)
        assert number == 0 or not states[valid & ~alive].any()  # zeros in place of dropped tokens
    assert (valid & ~alive).any()
    assert (found["compact"][-1] - plain[-1])[alive].abs().max() > 0.1


@feature("output_hidden_states")
def test_hidden_states_of_generate(family: str) -> None:
    model, inputs = shared_model(family), build_inputs(family)
    with attach(model, HashPolicy(), schedule=schedule_of(family)):
        expected = model(**inputs, output_hidden_states=True).hidden_states
        output = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
        )
    prefill, step, _ = output.hidden_states
    for states, wanted in zip(prefill, expected, strict=True):
        torch.testing.assert_close(states, wanted, **TOLERANCE)
    assert {tuple(states.shape[:2]) for states in step} == {(1, 1)}


class MaskedColumns:
    """An independent Eq. 7 for the eager attention of transformers: closed columns in its own mask."""

    def __init__(self, alive: Tensor) -> None:
        length = alive.shape[1]
        self.closed = ~(alive[:, None, None] | torch.eye(length, dtype=torch.bool))

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mask = kwargs["attention_mask"]
        assert mask.is_floating_point()
        return args, {**kwargs, "attention_mask": mask.masked_fill(self.closed, torch.finfo(mask.dtype).min)}


def assert_weights_by_hand(family: str, model: Any) -> None:
    """Row by row after one stage: no mask takes a token out of a state. There are weights of layers with attention."""
    schedule = Schedule(((1, 0.5),))
    with attach(model, HashPolicy(), schedule=schedule):
        found = model(**build_inputs(family, ROWS), output_attentions=True).attentions
    assert len(found) == sum(map(has_attention, decoder_of(model).layers))
    for row in range(len(ROWS)):
        with by_hand(model, schedule):
            inputs = single_row(family, build_inputs(family, ROWS), ROWS, row)
            expected = model(**inputs, output_attentions=True).attentions
        for weights, wanted in zip(found, expected, strict=True):
            mine = slice(weights.shape[2] - wanted.shape[2], None)  # padded on the left
            torch.testing.assert_close(weights[row, :, mine, mine], wanted[0], **TOLERANCE)
        assert expected[0].shape[2] < inputs["input_ids"].shape[1] or not ROWS[row]


@feature("output_attentions")
def test_attention_weights_are_those_among_the_survivors(family: str) -> None:
    model, inputs = shared_model(family, "eager"), build_inputs(family, ROWS)
    if keeps_state(model):
        assert_weights_by_hand(family, model)
        return
    with attach(model, HashPolicy(), schedule=schedule_of(family)) as pruner:
        found = model(**inputs, output_attentions=True).attentions
    layers = decoder_of(model).layers
    handles = [
        layer.register_forward_pre_hook(MaskedColumns(alive_at(pruner, inputs, index)), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    expected = model(**inputs, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    assert len(found) == len(expected) == len(layers)
    for index, weights in enumerate(found):
        alive = alive_at(pruner, inputs, index)
        longest = int(alive.sum(1).max())
        if index < schedule_of(family).layers[0]:
            longest = alive.shape[1]  # before the first stage the prompt's own padding is still there
        assert weights.shape == (3, 4, longest, longest)
        for row in range(3):
            mine = slice(longest - int(alive[row].sum()), None)  # padded on the left
            wanted = expected[index][row][:, alive[row]][:, :, alive[row]]
            torch.testing.assert_close(weights[row, :, mine, mine], wanted, **TOLERANCE)


@feature("output_attentions")
def test_mask_mode_has_no_attention_weights_to_give(family: str) -> None:
    model, inputs = shared_model(family, "eager"), build_inputs(family)
    if "mask" not in modes_of(model):
        return
    with (
        attach(model, HashPolicy(), schedule=schedule_of(family), mode="mask"),
        pytest.raises(ValueError, match=r'output_attentions=True.*mode="compact"'),
    ):
        model(**inputs, output_attentions=True)


@pytest.mark.parametrize("mode", MODES)
def test_outputs_as_a_tuple(mode: str) -> None:
    model, inputs = shared_model("llava"), build_inputs("llava", ROWS)
    with attach(model, HashPolicy(), schedule=schedule_of("llava"), mode=mode):
        assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)


class Soft(Policy):
    """A given keep mask at each stage, so that it can be differentiated."""

    uses_text = False

    def __init__(self, masks: list[Tensor]) -> None:
        self.masks = masks

    def decide(self, context: Any) -> Decision:
        mask = self.masks[context.stage]
        return Decision(mask.detach(), mask)


class InFloat64(TorchFunctionMode):
    """Computes in float64 what models cast to float32, as in RMSNorm: too coarse for finite differences."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return function(*args, **kwargs)


@feature("gradient of the keep mask")
def test_the_mask_gradient_is_that_of_finite_differences(family: str) -> None:
    model, inputs = in_float64(build_model(family)), build_inputs(family)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    count = int(visual_mask(inputs).sum())
    first = torch.tensor([1.0, 0.0, 0.3, 0.8], dtype=torch.float64).repeat(count)[:count]
    second = torch.tensor([0.4, 0.0, 0.0, 1.0], dtype=torch.float64).repeat(count)[:count]
    schedule = Schedule(((tiny_family(family).min_stage, 1.0), (4, 1.0)))

    def value(masks: list[Tensor]) -> Tensor:
        with InFloat64(), attach(model, Soft([mask[None] for mask in masks]), schedule=schedule, mode="mask"):
            return model(**inputs).logits[0, -1].log_softmax(-1)[5]

    leaves = [first.requires_grad_(), second.requires_grad_()]
    gradients = torch.autograd.grad(value(leaves), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].ne(0).all()  # at m = 0 too
    assert torch.equal(gradients[1] != 0, first > 0)  # what the first stage drops, the second cannot bring back

    def moved(stage: int, token: int, by: float) -> float:
        masks = [leaf.detach().clone() for leaf in leaves]
        masks[stage][token] += by
        return float(value(masks).detach())

    for stage, gradient in enumerate(gradients):
        for token in (0, 1, 2, 3, count - 1):
            if leaves[stage][token]:
                numeric = (moved(stage, token, 1e-7) - moved(stage, token, -1e-7)) / 2e-7
            else:  # a mask is not negative: from one side; a token that would dominate bends the value sharply
                here, above, beyond = (moved(stage, token, by) for by in (0, 1e-9, 2e-9))
                numeric = (4 * above - beyond - 3 * here) / 2e-9
            # Llama 4 rotates in complex64
            assert float(gradient[token]) == pytest.approx(numeric, rel=1e-3 if family == "llama4" else 1e-4, abs=1e-5)


def trained(
    model: Any, inputs: dict[str, Tensor], checkpointing: bool, use_reentrant: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of all parameters."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    if checkpointing:
        enable({"use_reentrant": use_reentrant})
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"].masked_fill(visual_mask(inputs), -100), use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@feature("gradient checkpointing")
@pytest.mark.parametrize(("mode", "use_reentrant"), [("compact", False), ("compact", True), ("mask", False)])
def test_checkpointing_changes_no_gradient(family: str, mode: str, use_reentrant: bool) -> None:
    inputs = build_inputs(family, (("image",), ("image", "image")))
    if mode not in modes_of(shared_model(family)):
        return
    outcome = []
    for checkpointing in (False, True):
        model = build_model(family).train().requires_grad_(True)
        with attach(model, HashPolicy(), schedule=schedule_of(family), mode=mode):
            if checkpointing and REPEATS_HOOKS:
                with pytest.raises(RuntimeError, match="runs the layers' hooks a second time"):
                    trained(model, inputs, checkpointing, use_reentrant)
                return
            outcome.append(trained(model, inputs, checkpointing, use_reentrant))
    (loss, gradients), (again, checkpointed) = outcome
    torch.testing.assert_close(again, loss)
    if lost := gradients.keys() - checkpointed.keys():  # a reentrant tower whose input is pixels has none, unpruned too
        model = build_model(family).train().requires_grad_(True)
        assert use_reentrant and not lost & trained(model, inputs, True, use_reentrant)[1].keys()
    assert gradients.keys() >= checkpointed.keys() and len(checkpointed) > 50
    for name, gradient in checkpointed.items():
        torch.testing.assert_close(gradient, gradients[name], msg=name)
    plain, unpruned = trained(build_model(family).train().requires_grad_(True), inputs, False)
    assert (plain - loss).abs() > 0.02
    name = next(name for name in gradients if "layers.5" in name and name.endswith(("q_proj.weight", "w1.weight")))
    assert (unpruned[name] - gradients[name]).abs().max() > 0.1 * gradients[name].abs().max()


@feature("gradient checkpointing")
def test_checkpointing_carries_the_gradient_of_the_keep_mask(family: str) -> None:
    inputs, gradients = build_inputs(family), []
    if "mask" not in modes_of(shared_model(family)):
        return
    count = int(visual_mask(inputs).sum())
    for checkpointing in (False, not REPEATS_HOOKS):
        model = build_model(family).train().requires_grad_(True)
        mask = torch.tensor([1.0, 0.0, 0.3]).repeat(count)[:count][None].requires_grad_()
        schedule = Schedule(((tiny_family(family).min_stage, 1.0),))
        with attach(model, Soft([mask]), schedule=schedule, mode="mask"):
            trained(model, inputs, checkpointing)
        gradients.append(mask.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].ne(0).all()


def encode(model: Any, inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The vision tower's output, and the inputs without pixels."""
    takes = inspect.signature(model.base_model.get_image_features).parameters
    features = model.base_model.get_image_features(
        **{name: value for name, value in inputs.items() if name in takes}, return_dict=True
    )
    return features, {name: value for name, value in inputs.items() if not name.startswith("pixel_values")}


@feature("reused vision features")
@pytest.mark.parametrize("mode", MODES)
def test_vision_features_serve_several_generations(family: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = shared_model(family), build_inputs(family, ROWS)
    if mode not in modes_of(model):
        return
    calls, original = [], type(model.base_model).get_image_features
    monkeypatch.setattr(
        type(model.base_model),
        "get_image_features",
        functools.wraps(original)(lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)),
    )
    plain = generate(model, inputs)
    with attach(model, HashPolicy(), schedule=schedule_of(family), mode=mode) as pruner:
        expected = generate(model, inputs)
        counts = [stage.counts for stage in pruner.trace]
        calls.clear()
        features, rest = encode(model, inputs)
        if not TAKES_FEATURES:
            with pytest.raises(ValueError, match="mm_encoder_outputs"):
                generate(model, rest, mm_encoder_outputs={"image": features})
            return
        for _ in range(3):
            pruner.trace.clear()
            again = generate(model, rest, mm_encoder_outputs={"image": features})
            assert torch.equal(again.tokens, expected.tokens) and torch.equal(again.logits, expected.logits)
            assert [stage.counts for stage in pruner.trace] == counts
    assert len(calls) == 1
    assert (plain.logits - expected.logits).abs().max() > 0.1
