"""Every family under every attention implementation that transformers has for it."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.models import agreement, flash_stand_in
from tests.models.agreement import MIXED, assert_agreement, last_states, model_of, schedule_of
from tests.models.features import NOT_APPLICABLE, feature
from tests.models.tiny_families import Rows, build_inputs, build_model, tiny_family
from toprl_models.probe import decoder_of, has_attention

BATCHES = {"single": (("image",),), "padded": MIXED}


def rows_of(family: str, batch: str) -> Rows:
    return (*BATCHES[batch], ("video", "image")) if batch == "padded" and tiny_family(family).video else BATCHES[batch]


def assert_same_as_sdpa_without_a_cache(family: str, model: Any) -> None:
    """Without a cache and without padding, transformers looks for packed sequences in the positions, if it gets any."""
    inputs, states = build_inputs(family), []
    del inputs["attention_mask"]
    for one in (model, model_of(family)):
        with agreement.attached(one, schedule_of(family)):
            states.append(last_states(one, **inputs, use_cache=False))
    torch.testing.assert_close(states[0], states[1], atol=agreement.ATOL, rtol=1e-4)


# --- eager and sdpa ---


@feature("eager")
@pytest.mark.parametrize("batch", BATCHES)
def test_eager(family: str, batch: str) -> None:
    assert_agreement(model_of(family, "eager"), build_inputs(family, rows_of(family, batch)), schedule_of(family))


@feature("sdpa")
@pytest.mark.parametrize("batch", BATCHES)
def test_sdpa(family: str, batch: str) -> None:
    assert_agreement(model_of(family, "sdpa"), build_inputs(family, rows_of(family, batch)), schedule_of(family))


# --- flex attention: its compiled CPU kernel takes a minute to build, so torch's uncompiled one runs here ---


@pytest.fixture
def _uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@feature("flex_attention")
@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
@pytest.mark.parametrize("batch", BATCHES)
def test_flex(family: str, batch: str) -> None:
    model = build_model(family, "flex_attention")
    inputs, seen = build_inputs(family, rows_of(family, batch)), Counter()
    layer = [layer for layer in decoder_of(model).layers if has_attention(layer)][-1]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update([type(kwargs["attention_mask"]).__name__]), with_kwargs=True
    )
    assert_agreement(model, inputs, schedule_of(family), masked=model_of(family))
    assert set(seen) == {"BlockMask"}


@feature("flex_attention")
@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
def test_flex_without_a_cache(family: str) -> None:
    assert_same_as_sdpa_without_a_cache(family, build_model(family, "flex_attention"))


@pytest.mark.parametrize("family", [family for name, family in NOT_APPLICABLE if name == "flex_attention"])
def test_flex_is_not_applicable_where_transformers_refuses_it(family: str) -> None:
    with pytest.raises(ValueError, match=r"does not support an attention implementation through torch's flex"):
        build_model(family, "flex_attention")


# --- flash attention 2: transformers' code for it, on a stand-in for the package ---


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return flash_stand_in.install(monkeypatch)


def plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """``[N, H, D]``: one sequence under a mask of 0 and 1, by a loop over heads and queries."""
    rows = []
    for head in range(q.shape[1]):
        keys, values = (t[:, head * k.shape[1] // q.shape[1]] for t in (k, v))
        for query, open_ in zip(q[:, head], seen.bool(), strict=True):
            weights = (keys[open_] @ query * q.shape[-1] ** -0.5).softmax(0)
            rows.append(weights @ values[open_])
    return torch.stack(rows).unflatten(0, (q.shape[1], -1)).transpose(0, 1)


# the examples in the documentation of flash_attn_func
CAUSAL = {(2, 5): [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], (5, 2): [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]}


@pytest.mark.parametrize("lengths", CAUSAL)
def test_the_stand_in_aligns_causal_masks_at_the_bottom_right(lengths: tuple[int, int]) -> None:
    q, k, v = torch.randn(lengths[0], 6, 8), torch.randn(lengths[1], 2, 8), torch.randn(lengths[1], 2, 8)
    found = flash_stand_in.flash_attn_func(q[None], k[None], v[None], causal=True)[0]
    torch.testing.assert_close(found, plainly(q, k, v, torch.tensor(CAUSAL[lengths])))


def test_the_stand_in_keeps_packed_sequences_apart() -> None:
    q, k, v = torch.randn(7, 2, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    ends_q, ends_k = torch.tensor([0, 2, 7], dtype=torch.int32), torch.tensor([0, 5, 7], dtype=torch.int32)
    found = flash_stand_in.flash_attn_varlen_func(q, k, v, ends_q, ends_k, 5, 5, causal=True)
    parts = [plainly(q[:2], k[:5], v[:5], torch.tensor(CAUSAL[2, 5]))]
    parts.append(plainly(q[2:], k[5:], v[5:], torch.tensor(CAUSAL[5, 2])))
    torch.testing.assert_close(found, torch.cat(parts))
    window = flash_stand_in.flash_attn_func(*(t[None, :3] for t in (q, k, v)), causal=True, window_size=(1, 1))[0]
    seen = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]])
    torch.testing.assert_close(window, plainly(q[:3], k[:3], v[:3], seen))


def num_attentions(model: Any) -> int:
    return sum(map(has_attention, decoder_of(model).layers))


@feature("flash_attention_2, stand-in")
@pytest.mark.parametrize("batch", BATCHES)
def test_flash_on_the_stand_in(family: str, batch: str, flash_calls: Counter[str]) -> None:
    """A batch without padding never takes the varlen path, which gapped positions would send it to."""
    model, inputs = build_model(family, "flash_attention_2"), build_inputs(family, rows_of(family, batch))
    compact = assert_agreement(model, inputs, schedule_of(family), masked=model_of(family))
    # one forward and the steps of an answer, unattached and attached
    calls = 2 * num_attentions(model) * (1 + agreement.NEW_TOKENS)
    assert flash_calls == {"flash_attn_func" if batch == "single" else "flash_attn_varlen_func": calls}
    sdpa = agreement.run(model_of(family), inputs, schedule_of(family))
    torch.testing.assert_close(compact.logits, sdpa.logits, atol=agreement.ATOL, rtol=1e-4)


@feature("flash_attention_2, stand-in")
def test_flash_without_a_cache(family: str, flash_calls: Counter[str]) -> None:
    model = build_model(family, "flash_attention_2")
    assert_same_as_sdpa_without_a_cache(family, model)
    assert flash_calls == {"flash_attn_func": num_attentions(model)}


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", [family for name, family in NOT_APPLICABLE if name.endswith("stand-in")])
def test_flash_is_not_applicable_where_it_is_another_model(family: str, flash_calls: Counter[str]) -> None:
    inputs = build_inputs(family)
    flash, sdpa = (build_model(family, one)(**inputs).logits for one in ("flash_attention_2", "sdpa"))
    assert flash_calls and (flash - sdpa).abs().max() > 0.1


# --- the package itself ---


@feature("flash_attention_2, real")
@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs a CUDA device and flash-attn")
def test_flash_on_a_gpu(family: str) -> None:
    """bfloat16 is all it takes: no further from float32 than twice what sdpa in bfloat16 is."""
    inputs = {name: value.cuda() for name, value in build_inputs(family, rows_of(family, "padded")).items()}
    logits = {}
    for name, implementation, dtype in (
        ("exact", "sdpa", torch.float32),
        ("sdpa", "sdpa", torch.bfloat16),
        ("flash", "flash_attention_2", torch.bfloat16),
    ):
        model = build_model(family).cuda().to(dtype)
        model.set_attn_implementation({"text_config": implementation})
        cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        plain = model(**cast).logits[:, -1].float()
        with agreement.attached(model, schedule_of(family)):
            logits[name] = model(**cast).logits[:, -1].float()
    error = {name: (logits[name] - logits["exact"]).abs().mean() for name in ("sdpa", "flash")}
    assert error["flash"] <= 2 * error["sdpa"]
    assert (logits["flash"] - plain).abs().mean() > 1.5 * error["flash"]  # pruned, and not something else
