"""Hooks that outlive errors, share nothing, patch nothing, and refuse what would be silently wrong."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.agreement import schedule_of
from tests.models.conftest import HashPolicy
from tests.models.test_outputs import MODES, ROWS, Soft, shared_model
from tests.models.tiny_families import FAMILY_NAMES, build_inputs, build_model, visual_mask
from toprl_models import FastV, Schedule, attach


def answer(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)


# --- nothing is patched, nothing is shared ---


def attributes_of_classes(model: Any) -> dict[type, dict[str, Any]]:
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    return {cls: dict(vars(cls)) for cls in classes}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_no_class_is_patched(family: str, mode: str) -> None:
    model, inputs = shared_model(family), build_inputs(family, ROWS)
    plain = answer(model, inputs)
    before = attributes_of_classes(model)
    with attach(model, HashPolicy(), schedule=schedule_of(family), mode=mode):
        assert not torch.equal(answer(model, inputs), plain)
        assert attributes_of_classes(model) == before
        # another model of the same classes does not notice
        other = build_model(family)
        assert torch.equal(answer(other, inputs), plain)
    assert torch.equal(answer(model, inputs), plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("one", "other"), list(itertools.pairwise([*FAMILY_NAMES, FAMILY_NAMES[0]])))
def test_two_attached_models_in_turn(one: str, other: str, mode: str) -> None:
    inputs = {name: build_inputs(name, ROWS) for name in (one, other)}
    alone = {}
    for name in (one, other):
        with attach(shared_model(name), HashPolicy(), schedule=schedule_of(name), mode=mode):
            alone[name] = shared_model(name)(**inputs[name]).logits
    with (
        attach(shared_model(one), HashPolicy(), schedule=schedule_of(one), mode=mode) as first,
        attach(shared_model(other), HashPolicy(), schedule=schedule_of(other), mode=MODES[mode == "compact"]),
    ):
        caches = {name: shared_model(name)(**inputs[name], use_cache=True).past_key_values for name in (one, other)}
        for name in (one, other):  # decoding steps of the two models alternate
            shared_model(name)(input_ids=torch.full((3, 1), 5), past_key_values=caches[name])
        assert torch.equal(first.model(**inputs[one]).logits, alone[one])
    assert not torch.equal(shared_model(one)(**inputs[one]).logits, alone[one])


def test_a_second_attach_is_refused_until_the_first_is_gone() -> None:
    model, schedule = build_model(), schedule_of("llava")
    pruner = attach(model, FastV(), schedule=schedule)
    for mode in MODES:
        with pytest.raises(RuntimeError, match=r"attached already; call \.detach\(\)"):
            attach(model, FastV(), schedule=schedule, mode=mode)
    pruner.detach()
    attach(model, FastV(), schedule=schedule).detach()


# --- threads ---


def in_thread(function: Callable[[], Any]) -> Any:
    """What ``function`` returns or raises in another thread."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


class Meanwhile(HashPolicy):
    """Calls a function once, from inside its first stage."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self.function: Callable[[], Any] | None = function

    def score(self, context: Any) -> Tensor:
        function, self.function = self.function, None
        if function is not None:
            self.outcome = function()
        return super().score(context)


def entries(pruner: Any, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """Ways to disturb a model that is running."""
    model = pruner.model
    embeddings = torch.randn(1, 4, 64)

    def unpruned() -> Any:
        with pruner.disabled():
            return model(**inputs)

    return {
        "forward": lambda: model(**inputs),
        "generate": lambda: answer(model, inputs),
        "text only": lambda: model(input_ids=torch.full((1, 4), 5)),
        "disabled": unpruned,
        "detach": pruner.detach,
        "decoder": lambda: model.get_decoder()(inputs_embeds=embeddings),
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entry", ["forward", "generate", "text only", "decoder", "disabled", "detach"])
def test_a_second_thread_is_refused_and_the_first_is_not_disturbed(entry: str, mode: str) -> None:
    model, inputs = shared_model("llava"), build_inputs("llava", ROWS)
    with attach(model, HashPolicy(), schedule=schedule_of("llava"), mode=mode):
        expected = model(**inputs).logits
    policy = Meanwhile(lambda: in_thread(entries(pruner, build_inputs())[entry]))
    with attach(model, policy, schedule=schedule_of("llava"), mode=mode) as pruner:
        assert torch.equal(model(**inputs).logits, expected)
        assert isinstance(policy.outcome, RuntimeError)
        assert "forward pass in another thread; put a lock around" in str(policy.outcome)
        assert len(pruner.trace) == len(pruner.schedule)
        # one after the other is fine
        assert torch.equal(in_thread(lambda: model(**inputs).logits), expected)
        assert torch.equal(model(**inputs).logits, expected)


def test_a_policy_that_runs_its_own_model_is_refused() -> None:
    model, inputs = shared_model("llava"), build_inputs()
    policy = Meanwhile(lambda: model(**inputs))
    with (
        attach(model, policy, schedule=schedule_of("llava")),
        pytest.raises(RuntimeError, match="its policy called the model"),
    ):
        model(**inputs)


def test_another_thread_between_a_pass_and_its_loss_changes_nothing() -> None:
    model, inputs = build_model(), build_inputs()
    call = {**inputs, "labels": inputs["input_ids"]}
    text = torch.full((1, inputs["input_ids"].shape[1]), 5)

    def meanwhile(*_: Any) -> None:
        handle.remove()
        outcomes.append(in_thread(lambda: model(input_ids=text, labels=text).loss))

    with attach(model, HashPolicy(), schedule=schedule_of("llava")):
        expected = [model(**call).loss, model(input_ids=text, labels=text).loss]
        outcomes: list[Tensor] = []
        handle = model.lm_head.register_forward_pre_hook(meanwhile)
        outcomes.insert(0, model(**call).loss)
        torch.testing.assert_close(outcomes, expected)


@pytest.mark.parametrize("mode", MODES)
def test_two_models_in_two_threads(mode: str) -> None:
    """Both are inside a stage at the same time, at every stage of the prompt."""
    names = ("llava", "qwen2_5_vl")
    inputs = {name: build_inputs(name, ROWS) for name in names}
    barrier = threading.Barrier(2, timeout=60)

    class Waits(HashPolicy):
        def score(self, context: Any) -> Tensor:
            barrier.wait()
            return super().score(context)

    alone, together = {}, {}
    for name in names:
        with attach(shared_model(name), HashPolicy(), schedule=schedule_of(name), mode=mode):
            alone[name] = answer(shared_model(name), inputs[name])

    def run(name: str) -> None:
        with attach(shared_model(name), Waits(), schedule=schedule_of(name), mode=mode):
            together[name] = answer(shared_model(name), inputs[name])

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert torch.equal(together[name], alone[name])


# --- errors and interrupts ---


def break_once(module: torch.nn.Module, error: BaseException, at_call: int = 1) -> None:
    """Raise ``error`` in the ``at_call``-th call of ``module``."""
    calls = itertools.count(1)

    def hook(*_: Any) -> None:
        if next(calls) == at_call:
            handle.remove()
            raise error

    handle = module.register_forward_pre_hook(hook)


PLACES = {
    "vision tower": lambda model: (model.model.vision_tower, 1),
    "last layer of the prompt": lambda model: (model.get_decoder().layers[-1], 1),
    "decoding": lambda model: (model.get_decoder().layers[3], 4),
    "head": lambda model: (model.lm_head, 2),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("place", list(PLACES))
def test_an_exception_leaves_pruner_and_model_usable(place: str, error: BaseException, mode: str) -> None:
    model, inputs = build_model(), build_inputs("llava", ROWS)
    plain = answer(model, inputs)
    with attach(model, HashPolicy(), schedule=schedule_of("llava"), mode=mode) as pruner:
        expected = answer(model, inputs)
        break_once(*(PLACES[place](model)[:1]), error, PLACES[place](model)[1])
        with pytest.raises(type(error)):
            answer(model, inputs)
        if isinstance(error, KeyboardInterrupt):  # its own thread takes over, and then anyone
            assert torch.equal(answer(model, inputs), expected)
        assert torch.equal(in_thread(lambda: answer(model, inputs)), expected)
        assert torch.equal(answer(model, inputs), expected)
        assert len(pruner.trace) == len(pruner.schedule)
        text = {"input_ids": torch.full((1, 4), 5)}
        with pruner.disabled():
            unpruned = model(**text).logits
        torch.testing.assert_close(model(**text).logits, unpruned, atol=1e-4, rtol=1e-4)
    assert torch.equal(answer(model, inputs), plain)
    assert not torch.equal(expected, plain)


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_exception_between_steps(error: BaseException) -> None:
    """In a stopping criterion, where no hook is running."""
    model, inputs = shared_model("llava"), build_inputs("llava", ROWS)

    def stop(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if ids.shape[1] == inputs["input_ids"].shape[1] + 3:
            raise error
        return torch.zeros(len(ids), dtype=torch.bool)

    with attach(model, HashPolicy(), schedule=schedule_of("llava")):
        expected = answer(model, inputs)
        with pytest.raises(type(error)):
            answer(model, inputs, stopping_criteria=[stop])
        assert torch.equal(answer(model, inputs), expected)


# --- refusals ---


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
@pytest.mark.parametrize("said", [True, False])
def test_reentrant_checkpointing_of_a_keep_mask_is_refused(said: bool) -> None:
    """Also where nobody said so: torch's default is reentrant."""
    model, inputs = build_model().train().requires_grad_(True), build_inputs()
    if said:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": True})
    else:
        model._set_gradient_checkpointing(gradient_checkpointing_func=torch.utils.checkpoint.checkpoint)
    with attach(model, HashPolicy(), schedule=schedule_of("llava"), mode="mask") as pruner:
        with pytest.raises(RuntimeError, match=r"reentrant gradient checkpointing.*\"use_reentrant\": False"):
            model(**inputs)
        model.eval()(**inputs)  # nothing is checkpointed here
        assert pruner.trace


def test_a_wrapper_that_runs_layers_again_is_refused() -> None:
    """torch's own wrapper repeats the hooks in the backward pass, when the prompt is long forgotten."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, inputs = build_model().train().requires_grad_(True), build_inputs()
    layers = model.get_decoder().layers
    with attach(model, HashPolicy(), schedule=schedule_of("llava")):
        layers[3] = checkpoint_wrapper(layers[3])
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        with pytest.raises(RuntimeError, match="the layer ran outside of the model's forward pass"):
            loss.backward()


def test_a_layer_that_is_called_alone_is_refused() -> None:
    model = shared_model("llava")
    states, tables = torch.randn(1, 4, 64), (torch.ones(1, 4, 16), torch.zeros(1, 4, 16))
    call = {"position_embeddings": tables, "attention_mask": None}
    layer = model.get_decoder().layers[2]
    with attach(model, HashPolicy(), schedule=schedule_of("llava")) as pruner:
        with pytest.raises(RuntimeError, match=r"ran outside of the model's forward pass.*detach\(\)"):
            layer(states, **call)
        with pruner.disabled():
            layer(states, **call)


def test_dropout_is_refused_in_mask_mode() -> None:
    model, inputs = build_model(), build_inputs()
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.1
    with attach(model, HashPolicy(), schedule=schedule_of("llava"), mode="mask"):
        model(**inputs)
        with pytest.raises(ValueError, match=r"dropout=0\.1"):
            model.train()(**inputs)


def test_a_mask_gradient_reaches_the_policy_through_disabled_and_back() -> None:
    """``disabled()`` inside a training loop: the next pass is pruned and differentiable again."""
    model, inputs = build_model(), build_inputs()
    mask = torch.full((1, int(visual_mask(inputs).sum())), 0.5, requires_grad=True)
    plain = model(**inputs).logits
    with attach(model, Soft([mask]), schedule=Schedule(((2, 1.0),)), mode="mask") as pruner:
        with pruner.disabled():
            assert torch.equal(model(**inputs).logits, plain)
        logits = model(**inputs).logits
        assert (logits - plain).abs().max() > 0.1
        logits.sum().backward()
    assert mask.grad is not None and mask.grad.ne(0).all()
