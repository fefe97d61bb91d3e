"""Every kind of key/value cache under pruning: the same answers, and the lengths that the schedule says."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache, cache_utils

from tests.models.agreement import keeps_state, lengths_of, model_of, modes_of, schedule_of
from tests.models.conftest import HashPolicy
from tests.models.features import NOT_APPLICABLE, feature
from tests.models.generating import (
    BATCH,
    NEW_TOKENS,
    SINGLE,
    TOLERANCE,
    assert_pruning_matters,
    assert_same,
    expected_lengths,
    generate,
    greedy,
    inputs_of,
    keep_all,
    more_text,
    pruned,
)
from tests.models.tiny_families import NUM_LAYERS, build_inputs, build_model, in_float64
from toprl_models import Decision, Policy, attach

STATIC = {"cache_implementation": "static", "disable_compile": True}


def dynamic_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config())


def text_turn(inputs: dict[str, torch.Tensor], count: int = 5) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass over text behind ``inputs``."""
    more = more_text(inputs, count)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    return {"input_ids": more, "attention_mask": mask, "position_ids": mask.cumsum(1)[:, -count:] - 1}


# --- DynamicCache ---


@feature("DynamicCache")
def test_dynamic_cache(family: str) -> None:
    inputs, model = inputs_of(family), model_of(family)
    compact, mask = (pruned(family, mode, inputs, past_key_values=dynamic_cache(model)) for mode in ("compact", "mask"))
    assert_same(compact, mask)
    assert_pruning_matters(compact, family)
    cache = compact.past_key_values
    assert lengths_of(cache) == expected_lengths(compact.pruner, inputs, NEW_TOKENS - 1)
    assert [layer.keys.shape[2] for layer in cache.layers if hasattr(layer, "keys")] == lengths_of(cache)
    if not keeps_state(model):  # else mode "mask" is by hand, without a cache
        assert lengths_of(mask.past_key_values) == [inputs["input_ids"].shape[1] + NEW_TOKENS - 1] * NUM_LAYERS
    full = pruned(family, "compact", inputs, schedule=keep_all(family), past_key_values=dynamic_cache(model))
    assert torch.equal(full.logits, greedy(family, "unattached").logits)


def test_a_pruned_cache_goes_with_its_last_user() -> None:
    """No cycle of references may keep gigabytes until the next garbage collection."""
    gc.disable()
    try:
        cache = weakref.ref(pruned("llava", "compact", inputs_of("llava")).past_key_values)
        assert cache() is None
    finally:
        gc.enable()


class Uneven(Policy):
    """Keeps other tokens, and another number of them, in every row: rows must not be mixed up."""

    def decide(self, context: Any) -> Decision:
        rows = torch.arange(1, len(context.valid_mask) + 1)[:, None]
        scores = torch.sin((context.visual_index + 1.0) * 12.9898 * (context.stage + 1) * rows).mul(4375.8).frac().abs()
        return Decision(scores, scores > 0.15 * rows)


ROWS: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("mode", ["compact", "mask"])
@pytest.mark.parametrize("change", ROWS)
def test_masks_follow_the_rows_of_the_cache(change: str, mode: str, copied: bool) -> None:
    model, inputs = model_of("llava"), build_inputs("llava", (("image",), ("image", "image"), ("image",)))
    turn = text_turn(inputs)
    act, rows = ROWS[change]
    with attach(model, Uneven(), schedule=schedule_of("llava"), mode=mode) as pruner:
        cache = model(**inputs, past_key_values=dynamic_cache(model)).past_key_values
        assert len(set(pruner.trace[0].counts)) == 3  # every row has another mask
        before = model(**turn, past_key_values=copy.deepcopy(cache)).logits
        changed = copy.deepcopy(cache) if copied else cache
        act(changed)
        after = model(**{name: value[rows] for name, value in turn.items()}, past_key_values=changed).logits
        if copied:  # and the original stays as it was
            again = model(**turn, past_key_values=cache).logits
            assert torch.equal(again, before)
    torch.testing.assert_close(after, before[rows], atol=TOLERANCE, rtol=0)


def test_a_batch_of_another_size_is_refused() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    turn = {name: value[:2] for name, value in text_turn(inputs).items()}
    with attach(model, HashPolicy(), schedule=schedule_of("llava")):
        cache = model(**inputs, use_cache=True).past_key_values
        for layer in cache.layers:
            layer.batch_select_indices(torch.tensor([0, 1]))
        with pytest.raises(RuntimeError, match="3 rows, but input_ids has 2"):
            model(**turn, past_key_values=cache)


def test_rolling_back() -> None:
    """Text may be taken back, or everything; a cut between visual tokens would mean other tokens in every layer."""
    model, inputs = model_of("llava"), inputs_of("llava")
    length, tail = inputs["input_ids"].shape[1], 5  # the row with the shortest text behind its image
    turn = text_turn(inputs)
    with attach(model, HashPolicy(), schedule=schedule_of("llava")):
        cache = model(**inputs, use_cache=True).past_key_values
        before = model(**turn, past_key_values=cache).logits
        cache.crop(-5)
        assert torch.equal(model(**turn, past_key_values=cache).logits, before)
        with pytest.raises(ValueError, match=rf"remove at most {tail + 5} tokens or all {length + 5}"):
            cache.crop(-tail - 6)
        with pytest.raises(ValueError, match="as a negative int"):
            cache.crop(12)
        cache.crop(-tail - 5)
        assert cache.get_seq_length() == length - tail
        cache.crop(-cache.get_seq_length())
        model(**build_inputs("llava", ((), (), ())), past_key_values=cache)
        cache.crop(-4)  # the images are forgotten
        cache.crop(-cache.get_seq_length())
        fresh = model(**inputs, past_key_values=cache).logits
        assert torch.equal(fresh, model(**inputs).logits)


# --- StaticCache ---


@feature("StaticCache")
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_static_cache(family: str, attn_implementation: str) -> None:
    """A padded batch: generate() hands the model prepared 4-D masks here, and keys have free slots."""
    inputs, model = inputs_of(family), model_of(family, attn_implementation)
    output = pruned(family, "compact", inputs, model=model, **STATIC)
    assert_same(output, greedy(family, "compact"))
    assert lengths_of(output.past_key_values) == expected_lengths(output.pruner, inputs, NEW_TOKENS - 1)
    assert_pruning_matters(output, family)
    if attn_implementation == "sdpa":  # mask mode has its own attention
        assert_same(pruned(family, "mask", inputs, model=model, **STATIC), output)
    unattached = generate(model, inputs, **STATIC)
    full = pruned(family, "compact", inputs, schedule=keep_all(family), model=model, **STATIC)
    assert_same(full, unattached)


@feature("StaticCache")
@pytest.mark.parametrize("rows", [SINGLE, BATCH])
def test_free_slots_of_a_static_cache_are_never_attended(family: str, rows: Any) -> None:
    """Each layer has its own number of filled slots; the others hold other numbers than zero here."""
    inputs, model = inputs_of(family, rows), model_of(family)
    turn = text_turn(inputs, 3)
    logits = []
    with attach(model, HashPolicy(), schedule=schedule_of(family)):
        for filling in (0.0, 50.0):
            cache = StaticCache(config=model.config.get_text_config(), max_cache_len=inputs["input_ids"].shape[1] + 9)
            model(**inputs, past_key_values=cache)
            layers = [layer for layer in cache.layers if hasattr(layer, "keys")]
            for layer, filled in zip(layers, lengths_of(cache), strict=True):
                layer.keys[:, :, filled:] = layer.values[:, :, filled:] = filling
            steps = [model(**turn, past_key_values=cache).logits]
            for step in range(1, 5):
                mask = torch.nn.functional.pad(turn["attention_mask"], (0, step), value=1)
                one = {"input_ids": turn["input_ids"][:, :1] + step, "attention_mask": mask}
                positions = mask.cumsum(1)[:, -1:] - 1
                steps.append(model(**one, position_ids=positions, past_key_values=cache).logits)
            logits.append(torch.cat(steps, 1))
    assert torch.equal(*logits)


@feature("StaticCache")
def test_a_reset_static_cache_forgets(family: str) -> None:
    """Masks of the prompt before last would hide tokens of a prompt that needs none itself."""
    model, words = model_of(family), build_inputs(family, ((),))
    full = inputs_of(family)
    answers: dict[str, list[Any]] = {}
    for mode in modes_of(model):
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=160)
        with attach(model, HashPolicy(), schedule=schedule_of(family), mode=mode):
            model(**full, past_key_values=cache)
            rows = {name: value.repeat(3, 1) for name, value in words.items()}
            cache.reset()
            answers[mode] = [generate(model, rows, past_key_values=cache, disable_compile=True)]
            cache.reset()
            answers[mode].append(generate(model, full, past_key_values=cache, disable_compile=True))
        assert_same(answers[mode][0], generate(model, rows))
        assert_same(answers[mode][1], greedy(family, "compact"))


# --- quantised ---


class Int8PerToken(cache_utils.QuantizedLayer):
    """transformers' own layer with its residual window, over a quantiser in plain torch instead of quanto or hqq.

    One scale per token and head: what a token becomes does not depend on which others are there, so that compact mode
    and mask mode stay comparable.
    """

    def __init__(self) -> None:
        super().__init__(nbits=8, residual_length=4)

    def _quantize(self, tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (tensor.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, tensor: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return tensor[0].to(tensor[1].dtype) * tensor[1]


def int8_cache() -> Any:
    return cache_utils.Cache(layers=[Int8PerToken() for _ in range(NUM_LAYERS)])


@feature("quantised cache")
def test_quantised_cache(family: str) -> None:
    """In float64, where rounding between two modes does not reach the quantiser's: a flip there is a step of 1 %."""
    model = in_float64(build_model(family))
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs_of(family).items()}
    compact, mask = (
        pruned(family, mode, inputs, model=model, past_key_values=int8_cache()) for mode in ("compact", "mask")
    )
    assert torch.equal(compact.tokens, mask.tokens)
    torch.testing.assert_close(compact.logits, mask.logits, atol=1e-9, rtol=0)
    assert lengths_of(compact.past_key_values) == expected_lengths(compact.pruner, inputs, NEW_TOKENS - 1)
    assert_pruning_matters(compact, family)
    # the answer really came from quantised keys and values
    assert (compact.logits[1:2] - greedy(family, "compact").logits[1:2]).abs().max() > 1e-3
    full = pruned(family, "compact", inputs, model=model, schedule=keep_all(family), past_key_values=int8_cache())
    assert torch.equal(full.logits, generate(model, inputs, past_key_values=int8_cache()).logits)


class RoundedToFp8(cache_utils.DynamicLayer):
    """The numbers of transformers' fp8 layer, written down independently: float32 states that were rounded."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        is_first = not self.is_initialized
        if is_first:
            self.lazy_initialization(key_states, value_states)
            self.scales = [states.abs().amax() / 448 for states in (key_states, value_states)]
        for name, new, scale in zip(("keys", "values"), (key_states, value_states), self.scales, strict=True):
            rounded = (new / scale).to(torch.float8_e4m3fn).float() * scale
            setattr(self, name, torch.cat([getattr(self, name), rounded], -2))
        return (key_states, value_states) if is_first else (self.keys, self.values)


@feature("quantised cache")
@pytest.mark.since("5.21.1")  # has a backend that needs no other package
def test_quantised_cache_of_transformers(family: str) -> None:
    """Its scales depend on the tokens that are there: compared with the same rounding, not with mask mode."""
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    inputs = inputs_of(family)
    output = pruned(family, "compact", inputs, **options)
    assert lengths_of(output.past_key_values) == expected_lengths(output.pruner, inputs, NEW_TOKENS - 1)
    rounded = cache_utils.Cache(layers=[RoundedToFp8() for _ in range(NUM_LAYERS)])
    assert_same(output, pruned(family, "compact", inputs, past_key_values=rounded))
    assert_pruning_matters(output, family)
    assert (output.logits[1] - greedy(family, "compact").logits[1]).abs().max() > 1e-2
    full = pruned(family, "compact", inputs, schedule=keep_all(family), **options)
    assert torch.equal(full.logits, generate(model_of(family), inputs, **options).logits)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", [family for name, family in NOT_APPLICABLE if name == "quantised cache"])
def test_quantised_caches_hold_full_attention_alone(family: str) -> None:
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    with pytest.raises(ValueError, match="only supported for models with only full attention"):
        generate(model_of(family), inputs_of(family), **options)


# --- offloaded ---


class Away:
    """Mixin of a cache layer: what is offloaded cannot be read until it is fetched back, as on another device."""

    away: Any = None

    def offload(self) -> None:
        self.away = (self.keys, self.values)  # type: ignore[has-type]
        self.keys, self.values = (torch.full_like(states, torch.nan) for states in self.away)

    def prefetch(self) -> None:
        if self.away is not None:
            (self.keys, self.values), self.away = self.away, None


class AwayDynamic(Away, cache_utils.DynamicLayer):
    pass


class AwayStatic(Away, cache_utils.StaticLayer):
    pass


class NoStream:
    """Stands in for a CUDA stream, which transformers asks for also where all is on the CPU."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
    def wait_stream(self, other: Any) -> None: ...


@pytest.fixture
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: NoStream())


@feature("offloaded cache")
@pytest.mark.usefixtures("no_streams")
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_offloaded_cache(family: str, kind: str) -> None:
    """transformers' own offloading, with layers that fill what is away with NaN, and without streams."""
    inputs = inputs_of(family)

    def cache() -> Any:
        if kind == "dynamic":
            away: Any = AwayDynamic
        else:
            away = functools.partial(AwayStatic, max_cache_len=inputs["input_ids"].shape[1] + 9)
        layers = dynamic_cache(model_of(family)).layers
        return cache_utils.Cache([away() if hasattr(one, "keys") else one for one in layers], offloading=True)

    output = pruned(family, "compact", inputs, past_key_values=cache(), disable_compile=True)
    assert_same(output, greedy(family, "compact"))
    assert lengths_of(output.past_key_values) == expected_lengths(output.pruner, inputs, NEW_TOKENS - 1)
    layers = [layer for layer in output.past_key_values.layers if hasattr(layer, "keys")]
    assert sum(layer.away is not None for layer in layers) >= len(layers) - 1
    full = pruned(family, "compact", inputs, schedule=keep_all(family), past_key_values=cache(), disable_compile=True)
    assert_same(full, greedy(family, "unattached"))


# --- no cache, copied cache ---


@feature("use_cache=False")
def test_without_a_cache(family: str) -> None:
    """Every step is a prefill, and keeps what was decided for the prompt."""
    inputs = inputs_of(family)
    for mode in ("compact", "mask"):
        policy = HashPolicy()
        output = pruned(family, mode, inputs, policy=policy, use_cache=False)
        assert_same(output, greedy(family, "compact"))
        by_hand = mode == "mask" and keeps_state(model_of(family))
        assert policy.calls == (0 if by_hand else len(schedule_of(family)))
    assert_pruning_matters(output, family)
    full = pruned(family, "compact", inputs, schedule=keep_all(family), use_cache=False)
    assert torch.equal(full.logits, generate(model_of(family), inputs, use_cache=False).logits)


@feature("copied cache")
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_cache_goes_its_own_way(family: str, how: str) -> None:
    inputs, model = inputs_of(family), model_of(family)
    turns = [text_turn(inputs, count) for count in (5, 4)]
    logits: dict[str, list[torch.Tensor]] = {}
    for mode in modes_of(model):
        with attach(model, HashPolicy(), schedule=schedule_of(family), mode=mode):
            cache = model(**inputs, past_key_values=dynamic_cache(model)).past_key_values
            twin = copy.deepcopy(cache) if how == "deepcopy" else pickle.loads(pickle.dumps(cache))
            before = lengths_of(cache)
            first = model(**turns[0], past_key_values=twin).logits
            assert lengths_of(cache) == before
            assert torch.equal(model(**turns[0], past_key_values=cache).logits, first)
            logits[mode] = [first]
            if not keeps_state(model):  # which cannot be taken back
                cache.crop(-5)
                logits[mode].append(model(**turns[1], past_key_values=cache).logits)
    for compact, mask in zip(logits["compact"], logits[mode], strict=True):
        torch.testing.assert_close(compact, mask, atol=TOLERANCE, rtol=0)


def test_masks_that_do_not_tell_the_padding_are_refused() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    inputs, model = inputs_of("llava", SINGLE), model_of("llava")
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = create_block_mask(lambda b, h, q, k: q >= k, 1, None, length, length, device="cpu")
    with (
        attach(model, HashPolicy(), schedule=schedule_of("llava")),
        pytest.raises(TypeError, match="attention_mask is a BlockMask; pass the 2-D"),
    ):
        model(**inputs)


def test_cache_methods_take_keywords() -> None:
    inputs = inputs_of("llava", (("image",), ("image", "image")))
    model, rows = model_of("llava"), torch.tensor([1, 0])
    with attach(model, HashPolicy(), schedule=schedule_of("llava")):
        caches = [model(**inputs, use_cache=True).past_key_values for _ in range(2)]
        caches[0].reorder_cache(beam_idx=rows)
        caches[1].reorder_cache(rows)
        for name, argument in (("batch_repeat_interleave", 2), ("batch_select_indices", torch.tensor([0, 3]))):
            getattr(caches[0], name)(**{{"batch_repeat_interleave": "repeats"}.get(name, "indices"): argument})
            getattr(caches[1], name)(argument)
        logits = [model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache).logits for cache in caches]
    assert torch.equal(*logits)
