"""What transformers refuses or does otherwise without a pruner too: why features do not apply to some families."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.models.agreement import MIXED, model_of
from tests.models.features import NOT_APPLICABLE, case
from tests.models.generating import BATCH, SINGLE, generate, inputs_of
from tests.models.test_compile_and_precision import compiled_answer, num_graphs
from tests.models.test_decoding import SPECULATIVE, assistant_of
from tests.models.test_prefixes import split
from tests.models.tiny_families import build_inputs, build_model

SEVERAL = {"num_return_sequences": 2, "do_sample": True}
RAISES = (
    case("llama4", "num_return_sequences", SEVERAL, ValueError, "features and image tokens do not match"),
    case("llama4", "beam search", {"num_beams": 3}, ValueError, "features and image tokens do not match"),
    case("llama4", "prefill in chunks", {"prefill_chunk_size": 7}, KeyError, "pooler_output"),
    case("ovis2", "prefill in chunks", {"prefill_chunk_size": 7}, TypeError, "subscriptable|indices|slice|index"),
)


@pytest.mark.since("5.23")
@pytest.mark.parametrize(("name", "options", "error", "message", "family"), RAISES)
def test_generation_raises(name: str, options: dict[str, Any], error: Any, message: str, family: str) -> None:
    assert (name, family) in NOT_APPLICABLE
    with pytest.raises(error, match=message):
        generate(model_of(family), inputs_of(family, BATCH), **options)


@pytest.mark.parametrize(("backend", "family"), [case("llama4", "flash_attention_2")])
def test_a_backend_is_refused(backend: str, family: str) -> None:
    assert (f"{backend}, stand-in", family) in NOT_APPLICABLE
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        build_model(family, backend)


@pytest.mark.parametrize(
    ("name", "family"), [case("paligemma", name) for name in ("assisted decoding", "prompt lookup")]
)
def test_a_prompt_sees_its_drafts(name: str, family: str) -> None:
    """Tokens of a prompt see all tokens of its pass, drafts among them, and greedy decoding gives other answers."""
    assert (name, family) in NOT_APPLICABLE
    model, inputs = model_of(family), inputs_of(family, SINGLE)
    inputs["input_ids"][:, -3:] = torch.tensor([10, 11, 10])  # so that prompt lookup finds something at once
    drafts = {"assistant_model": assistant_of(family)} if "assisted" in name else {"prompt_lookup_num_tokens": 3}
    answers = [generate(model, inputs, **SPECULATIVE, **options).logits[0] for options in ({}, drafts)]
    assert (answers[0] - answers[1]).abs().max() > 0.1


@pytest.mark.parametrize("family", [case("paligemma")])
def test_a_part_of_a_prompt_does_not_see_what_comes_later(family: str) -> None:
    """So a prompt in chunks, or an image whose question comes later, is another prompt than the whole."""
    assert {(name, family) for name in ("prefill in chunks", "image-only prefix for many questions")} <= {
        *NOT_APPLICABLE
    }
    model, inputs = model_of(family), build_inputs(family)
    whole = model(**inputs).logits[:, -1]
    prefix, question = split(inputs)
    cache = model(**prefix, use_cache=True).past_key_values
    later = model(input_ids=question, past_key_values=copy.deepcopy(cache)).logits[:, -1]
    assert (later - whole).abs().max() > 0.1
    chunks = generate(model, inputs, prefill_chunk_size=question.shape[1] + 1).logits[0]
    assert (chunks - whole).abs().max() > 0.1


@pytest.mark.parametrize("family", [case("llama4")])
def test_no_step_is_compiled(family: str) -> None:
    assert ("torch.compile of the decode step", family) in NOT_APPLICABLE
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled_answer(model_of(family), build_inputs(family, MIXED))
    assert num_graphs() == 0


@pytest.mark.parametrize("family", [case("minicpmv4_6")])
def test_logits_to_keep_is_ignored(family: str) -> None:
    assert ("logits_to_keep", family) in NOT_APPLICABLE
    inputs = build_inputs(family)
    assert model_of(family)(**inputs, logits_to_keep=3).logits.shape[1] == inputs["input_ids"].shape[1]
