"""torch.compile of decoding steps behind an eager, pruned prompt; bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from tests.models.agreement import (
    MIXED,
    attached,
    expected_counts,
    generate,
    kept_slots,
    last_states,
    modes_of,
    schedule_of,
)
from tests.models.conftest import HashPolicy
from tests.models.features import feature
from tests.models.test_outputs import MODES, shared_model
from tests.models.tiny_families import Rows, build_inputs, build_model, visual_mask
from toprl_models import Policy, Schedule, attach


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled_answer(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """generate() with the compilation that it turns on by itself where there is a GPU."""
    from transformers import CompileConfig

    model.__dict__.pop("_compiled_call", None)
    config = CompileConfig(fullgraph=True, dynamic=False, **{"backend": "eager", "mode": None, **options})
    config._compile_all_devices = True
    try:
        return generate(model, inputs, cache_implementation="static", compile_config=config)
    finally:
        model.__dict__.pop("_compiled_call", None)


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_one_graph(model: Any = None, inputs: dict[str, Tensor] | None = None) -> None:
    """All steps ran in one graph: no break, no second compilation; or in as many as the unattached ``model`` needs."""
    found = num_graphs()
    assert not torch._dynamo.utils.counters["graph_break"]
    if found > 1 and inputs is not None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled_answer(model, inputs)
        assert num_graphs() >= found
    else:
        assert found == 1


def assert_compiled_is_eager(family: str, rows: Rows) -> None:
    model, inputs = shared_model(family), build_inputs(family, rows)
    plain = generate(model, inputs)
    with attached(model, schedule_of(family)) as pruner:
        eager = generate(model, inputs)
        compiled = compiled_answer(model, inputs)
        assert [stage.counts for stage in pruner.trace] == expected_counts(inputs, schedule_of(family))
    assert_one_graph(model, inputs)
    assert torch.equal(compiled.sequences, eager.sequences)
    torch.testing.assert_close(torch.stack(compiled.logits), torch.stack(eager.logits), atol=1e-4, rtol=1e-4)
    assert (torch.stack(compiled.logits)[0] - torch.stack(plain.logits)[0]).abs().max() > 0.1


@feature("torch.compile of the decode step")
def test_generate_compiles_its_steps_into_one_graph(family: str) -> None:
    assert_compiled_is_eager(family, MIXED)


def test_steps_without_padding_compile_into_one_graph() -> None:
    assert_compiled_is_eager("llava", (("image",),))


@pytest.mark.exhaustive  # half a minute in the compiler
def test_steps_compiled_by_inductor() -> None:
    model, inputs = shared_model("llava"), build_inputs("llava", MIXED)
    with attached(model, schedule_of("llava")):
        eager = generate(model, inputs)
        compiled = compiled_answer(model, inputs, backend="inductor")
    assert_one_graph()
    assert torch.equal(compiled.sequences, eager.sequences)
    torch.testing.assert_close(torch.stack(compiled.logits), torch.stack(eager.logits), atol=1e-4, rtol=1e-4)


def test_a_compiled_forward_in_a_loop_of_ones_own() -> None:
    """Two prompts of different lengths on one cache that is reset in between: the second needs no new graph."""
    from transformers import StaticCache

    model = shared_model("llava")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
    with attached(model, schedule_of("llava")), torch.no_grad():
        step = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
        for seed, rows in ((0, (("image", "image"),)), (1, (("image",),))):
            inputs = build_inputs("llava", rows, seed)
            expected = generate(model, inputs)
            cache.reset()
            logits = [model(**inputs, past_key_values=cache).logits[:, -1]]
            for _ in range(7):
                position = cache.get_seq_length()[None, None]
                token = logits[-1].argmax(-1, keepdim=True)
                logits.append(step(input_ids=token, position_ids=position, past_key_values=cache).logits[:, -1])
            torch.testing.assert_close(torch.stack(logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    assert_one_graph()


def test_a_static_cache_that_was_reset_has_forgotten_the_padding() -> None:
    """A single token, which brings no masks of its own, behind a padded prompt that is gone."""
    from transformers import StaticCache

    model, inputs = shared_model("llava"), build_inputs("llava", MIXED)
    config, token = model.config.get_text_config(), torch.tensor([[5], [6], [7]])
    plain = model(input_ids=token, past_key_values=StaticCache(config=config, max_cache_len=60)).logits
    cache = StaticCache(config=config, max_cache_len=60)
    with attached(model, schedule_of("llava")), torch.no_grad():
        model(**inputs, past_key_values=cache)
        cache.reset()
        torch.testing.assert_close(model(input_ids=token, past_key_values=cache).logits, plain)


@pytest.mark.exhaustive  # half a minute of tracing, for something nobody should do
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_prompt_is_right_but_breaks_the_graph(mode: str) -> None:
    model, inputs = shared_model("llava"), build_inputs("llava", MIXED)
    labels = inputs["input_ids"].masked_fill(visual_mask(inputs), -100)
    with attached(model, schedule_of("llava"), mode) as pruner:
        eager = model(**inputs, labels=labels)
        compiled = torch.compile(model, backend="eager")(**inputs, labels=labels)
        assert [stage.counts for stage in pruner.trace] == expected_counts(inputs, schedule_of("llava"))
    alive = kept_slots(inputs, pruner.trace[-1])
    torch.testing.assert_close(compiled.logits[alive], eager.logits[alive], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(compiled.loss, eager.loss, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["graph_break"]


# --- bfloat16 ---


def rms(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())


@feature("bfloat16")
@pytest.mark.parametrize("rows", [(("image",),), MIXED], ids=["single", "padded"])
def test_bfloat16_rounds_compact_mode_no_worse_than_mask_mode(family: str, rows: Rows) -> None:
    """Both modes add the same numbers in other orders, so their roundings differ. The yardstick is each one's distance
    from the same mode in float32 with the same (rounded) weights: of the two, neither may be twice the other's."""
    inputs = build_inputs(family, rows)
    rounded = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    low = build_model(family).bfloat16()
    high = build_model(family).bfloat16().float()
    for module in (*low.modules(), *high.modules()):
        if hasattr(module, "top_k") and hasattr(module, "num_experts"):
            module.top_k = module.num_experts  # a token that rounding sends to other experts is another token
    exact = {name: value.float() if value.is_floating_point() else value for name, value in rounded.items()}
    error, states, modes = {}, {}, modes_of(low)
    for mode in modes:
        with attached(high, schedule_of(family), mode) as pruner:
            reference = last_states(high, **exact)
        with attached(low, schedule_of(family), mode) as pruner:
            states[mode] = last_states(low, **rounded)
            cache = generate(low, rounded).past_key_values
            assert {layer.keys.dtype for layer in cache.layers if hasattr(layer, "keys")} == {torch.bfloat16}
        assert states[mode].dtype == torch.bfloat16
        assert [stage.counts for stage in pruner.trace] == expected_counts(inputs, schedule_of(family))
        alive = kept_slots(inputs, pruner.trace[-1])
        error[mode] = rms(states[mode][alive] - reference[alive])
    unpruned = last_states(high, **exact)
    if "mask" not in modes:  # where there is no other mode, the yardstick is the unattached model
        states["mask"] = states["compact"]
        error["mask"] = rms((last_states(low, **rounded) - unpruned)[alive])
    assert 0 < error["compact"] < 2 * error["mask"]
    assert error["mask"] < 2 * error["compact"]
    # the two modes differ by no more than the sum of their errors, which is far below what pruning does
    assert rms((states["compact"] - states["mask"])[alive]) <= error["compact"] + error["mask"]
    assert rms((reference - unpruned)[alive]) > 2 * error["compact"]


class BySign(Policy):
    """Scores in whatever dtype the model has."""

    def score(self, context: Any) -> Tensor:
        return context.hidden_states[..., 0]


@feature("bfloat16")
@pytest.mark.parametrize("mode", MODES)
def test_policies_may_score_in_bfloat16(family: str, mode: str) -> None:
    """Including under autocast, where the model stays in float32 and its states may not."""
    inputs = build_inputs(family, MIXED)
    schedule: Schedule = schedule_of(family)
    low = build_model(family).bfloat16()
    if mode not in modes_of(low):
        return
    rounded = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    with attach(low, BySign(), schedule=schedule, mode=mode) as pruner:
        low(**rounded)
        assert pruner.trace[0].scores.dtype == torch.bfloat16
        assert [stage.counts for stage in pruner.trace] == expected_counts(inputs, schedule)
    model = shared_model(family)
    with (
        attach(model, HashPolicy(), schedule=schedule, mode=mode) as pruner,
        torch.autocast("cpu", torch.bfloat16),
    ):
        logits = model(**inputs).logits
    with attach(model, HashPolicy(), schedule=schedule, mode=mode) as pruner:
        exact = model(**inputs).logits
    alive = kept_slots(inputs, pruner.trace[-1])
    assert 0 < rms((logits - exact)[alive]) < 0.2 * rms(exact[alive])
