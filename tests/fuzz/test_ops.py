"""Every op with arguments that are right, or wrong in one or two places: the definition's result, or a clear error."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.cases import outcome, share
from toprl_kernels import (
    actor_score,
    attention_plan,
    compact_cache,
    flops,
    keep_mask_log_prob,
    masked_attention,
    prune_stage,
    sample_keep_mask,
    topk_compact,
)
from toprl_kernels.testing import make_actor_weights

Draw = Callable[[st.SearchStrategy], Any]
SIZES = st.integers(0, 5)
FLOATS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
SPECIAL = (0.0, -0.0, math.nan, math.inf, -math.inf, -7.5)
NAMES = ("hidden", "ranges", "blocks", "")  # words that arguments are mistaken for


def floats(draw: Draw, *shape: int, dtype: torch.dtype = torch.float32, special: bool = True) -> Tensor:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).to(dtype)
    if special and tensor.numel() and draw(st.booleans()):
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(st.sampled_from(SPECIAL))
    return tensor


def bools(draw: Draw, *shape: int) -> Tensor:
    return floats(draw, *shape, special=False) > draw(st.sampled_from([-9.0, -0.5, 0.5, 9.0]))


def maybe(draw: Draw, make: Callable[[], Any]) -> Any:
    return make() if draw(st.booleans()) else None


def attention(draw: Draw) -> dict[str, Any]:
    batch, heads, groups, dtype = draw(SIZES), draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(FLOATS)
    dim, value_dim = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    keys = draw(st.integers(0, 7))
    queries = draw(st.integers(0, keys))
    soft = draw(st.booleans())
    return dict(
        query=floats(draw, batch, heads * groups, queries, dim, dtype=dtype),
        key=floats(draw, batch, heads, keys, dim, dtype=dtype),
        value=floats(draw, batch, heads, keys, value_dim, dtype=dtype),
        keep_mask=floats(draw, batch, keys, special=False).clamp(0, 1) if soft else bools(draw, batch, keys),
        key_padding_mask=maybe(draw, lambda: bools(draw, batch, keys)),
        is_causal=draw(st.booleans()),
        window=maybe(draw, lambda: draw(st.integers(1, 9))),
        block_ids=maybe(draw, lambda: torch.arange(keys).expand(batch, -1) // 2 - 1),
        scale=draw(st.sampled_from([None, 1.0, 0.0, -0.3])),
        return_lse=draw(st.booleans()),
    )


def plan(draw: Draw) -> dict[str, Any]:
    names = ("keep_mask", "key_padding_mask", "is_causal", "window", "block_ids")
    return {name: value for name, value in attention(draw).items() if name in names}


def topk(draw: Draw) -> dict[str, Any]:
    batch, tokens = draw(SIZES), draw(st.integers(0, 7))
    k = draw(st.integers(0, tokens))
    if draw(st.booleans()):
        k = torch.randint(0, tokens + 1, (batch,), generator=torch.Generator().manual_seed(k))
    return dict(
        hidden_states=floats(draw, batch, tokens, draw(SIZES), dtype=draw(FLOATS)),
        scores=floats(draw, batch, tokens, dtype=draw(FLOATS)),
        k=k,
        position_ids=maybe(draw, lambda: torch.arange(3 * batch * tokens).view(3, batch, tokens)),
        valid_mask=maybe(draw, lambda: bools(draw, batch, tokens)),
        threshold=draw(st.sampled_from([None, 0.0, -1.0, math.inf])),
        padding_side=draw(st.sampled_from(["left", "right"])),
        return_inverse=draw(st.booleans()),
    )


def cache(draw: Draw) -> dict[str, Any]:
    batch, heads, tokens = draw(SIZES), draw(SIZES), draw(st.integers(1, 6))
    kept = draw(st.integers(0, tokens))
    indices = torch.stack([torch.randperm(tokens)[:kept].sort().values for _ in range(batch)]) if batch else None
    return dict(
        keys=floats(draw, batch, heads, tokens, draw(SIZES), dtype=draw(FLOATS)),
        values=floats(draw, batch, heads, tokens, draw(SIZES), dtype=draw(FLOATS)),
        indices=torch.zeros(0, kept, dtype=torch.int64) if indices is None else indices,
        validate=True,
    )


def actor(draw: Draw) -> dict[str, Any]:
    batch, tokens = draw(SIZES), draw(SIZES)
    return dict(
        hidden_states=floats(draw, batch, tokens, 6, dtype=draw(FLOATS)),
        stage=draw(st.integers(0, 2)),
        weights=make_actor_weights(6, 4),
        valid_mask=maybe(draw, lambda: bools(draw, batch, tokens)),
    )


def stage(draw: Draw) -> dict[str, Any]:
    batch, text, visual = draw(SIZES), draw(st.integers(0, 3)), draw(st.integers(0, 5))
    columns = torch.tensor([-1] * text + list(range(visual)), dtype=torch.int64).expand(batch, -1)
    logits = draw(st.booleans())
    return dict(
        hidden_states=floats(draw, batch, text + visual, draw(SIZES), dtype=draw(FLOATS)),
        scores=floats(draw, batch, visual, *([2] if logits else [])),
        columns=columns,
        k=draw(st.integers(0, visual)),
        position_ids=maybe(draw, lambda: torch.arange(text + visual)[None]),
        padding_side=draw(st.sampled_from(["left", "right"])),
    )


def sample(draw: Draw) -> dict[str, Any]:
    batch, tokens = draw(SIZES), draw(SIZES)
    return dict(
        logits=floats(draw, batch, tokens, 2, dtype=draw(FLOATS), special=False),
        seed=draw(st.integers(0, 2**40)),
        tau=draw(st.sampled_from([1.0, 0.05, 7.0])),
        previous_mask=maybe(draw, lambda: bools(draw, batch, tokens)),
    )


def log_prob(draw: Draw) -> dict[str, Any]:
    logits = floats(draw, draw(SIZES), draw(SIZES), 2, dtype=draw(FLOATS), special=False)
    return dict(logits=logits, keep_mask=bools(draw, *logits.shape[:2]))


OPS: dict[Callable[..., Any], Callable[[Draw], dict[str, Any]]] = {
    masked_attention: attention,
    attention_plan: plan,
    topk_compact: topk,
    compact_cache: cache,
    actor_score: actor,
    prune_stage: stage,
    sample_keep_mask: sample,
    keep_mask_log_prob: log_prob,
}

# which scores the columns ask for cannot be checked without waiting for a GPU
UNCHECKED = {prune_stage: {"scores", "columns"}}


def spoiled(draw: Draw, value: Any) -> Any:
    """Something else in the place of ``value``."""
    if isinstance(value, Tensor) and draw(st.integers(0, 4)):
        ways: list[Callable[[], Any]] = [
            lambda: value[..., None],
            lambda: value[0] if value.ndim and len(value) else value.flatten(),
            lambda: torch.cat([value, value[:1]]) if value.ndim else value[None],
            lambda: torch.cat([value, value[..., :1]], -1) if value.ndim else value[None],
            lambda: value.to(draw(st.sampled_from([torch.int64, torch.bool, torch.float32, torch.complex64]))),
            lambda: value.to("meta"),
            lambda: value.tolist(),
            lambda: value.numpy() if value.dtype != torch.bfloat16 else None,
        ]
        return draw(st.sampled_from(ways))()
    if isinstance(value, int) and not isinstance(value, bool) and draw(st.booleans()):
        return draw(st.sampled_from([-1, value + 9, 2**70, float(value), math.nan, torch.tensor(value)]))
    return draw(st.sampled_from([None, True, -1, 1.5, math.nan, "", "left", [], {}, torch.zeros(2), object()]))


def flat(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, tuple) else [result]
    return [part for part in parts if isinstance(part, Tensor)]


@share(70)
@given(st.data())
def test_right_or_refused(data: st.DataObject) -> None:
    op = data.draw(st.sampled_from(list(OPS)), "op")
    arguments = OPS[op](data.draw)
    names = sorted(set(arguments) - UNCHECKED.get(op, set()))
    wrong = data.draw(st.sets(st.sampled_from(names), max_size=2), "spoiled")
    for name in wrong:
        arguments[name] = spoiled(data.draw, arguments[name])
    results, refusal = outcome(partial(op, **arguments, backend="eager"))
    if refusal:
        assert wrong, f"refused: {refusal}"
        assert any(name in refusal for name in inspect.signature(op).parameters), (
            f"does not name an argument: {refusal}"
        )
        return
    results = flat(results)
    rough = any(getattr(x, "dtype", None) in (torch.bfloat16, torch.float16) for x in arguments.values())
    close = dict(rtol=0.05, atol=0.05) if rough else dict(rtol=1e-4, atol=1e-4)
    defined, refusal = outcome(partial(op, **arguments, backend="reference"))
    assert not refusal
    for got, want in zip(results, flat(defined), strict=True):
        assert got.shape == want.shape and got.device == want.device
        if got.device.type != "meta":
            torch.testing.assert_close(got.to(want.dtype), want, **close, equal_nan=True)


NUMBERS = st.one_of(st.integers(-3, 40), st.floats(-3, 700), st.sampled_from([math.nan, math.inf, -math.inf]))


@share(10)
@given(st.floats(0, 600), st.lists(st.tuples(NUMBERS, NUMBERS), max_size=4), st.integers(1, 32))
def test_segments_cover_all_layers_or_are_refused(visual: float, stages: list[tuple[Any, Any]], layers: int) -> None:
    parts, refusal = outcome(lambda: flops.segments(visual, stages, layers))
    if refusal:
        assert "stages[" in refusal
        return
    assert math.isclose(sum(part.num_layers for part in parts), layers)
    counts = [part.num_tokens for part in parts]
    assert counts == sorted(counts, reverse=True) and counts[0] == visual
    assert 0 <= flops.average_tokens(visual, stages, layers) <= visual * (1 + 1e-9)
