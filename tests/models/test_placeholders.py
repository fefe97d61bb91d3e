"""Which tokens count as visual: prompts given as embeddings, and placeholders that are masked out."""

from __future__ import annotations

import pytest
import torch

from tests.models.agreement import model_of, schedule_of
from tests.models.conftest import HashPolicy
from tests.models.tiny_families import FAMILY_NAMES, IMAGE_ID, VIDEO_ID, build_inputs, tiny_family, visual_mask
from toprl_models import attach
from toprl_models.runtime.prompt import find_placeholders

GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_prompt_of_embeddings_is_pruned_as_its_ids_are(family):
    model, inputs = model_of(family), build_inputs(family, (("image",), ("image", "image")))
    unpruned = torch.stack(model.generate(**inputs, **GREEDY).logits)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with attach(model, HashPolicy(), schedule=schedule_of(family)) as pruner:
        by_ids = torch.stack(model.generate(**inputs, **GREEDY).logits)
        counts = [stage.counts for stage in pruner.trace]
        by_embeddings = torch.stack(model.generate(**inputs, inputs_embeds=embeddings, **GREEDY).logits)
        assert [stage.counts for stage in pruner.trace] == counts
    assert torch.equal(by_embeddings, by_ids)
    assert (by_ids - unpruned).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_placeholders_among_embeddings_are_told_apart_by_id(family):
    model, kinds = model_of(family), ("image", "video") if tiny_family(family).video else ("image",)
    ids = build_inputs(family, (kinds, ("image",)))["input_ids"]
    embed = model.get_input_embeddings()
    for wanted in ((IMAGE_ID,), (VIDEO_ID,), (IMAGE_ID, VIDEO_ID)):
        expected = torch.isin(ids, torch.tensor(wanted))
        for tokens in (ids, embed(ids)):
            assert torch.equal(find_placeholders(wanted, tokens, lambda: embed), expected)


@pytest.mark.parametrize("mode", ["compact", "mask"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_prompt_whose_visual_tokens_are_all_padding_is_not_pruned(family, mode):
    """The policy sees no empty row, and the cache's state is that of a prompt with images: one compiled graph fits."""
    model, inputs = model_of(family), build_inputs(family, (("image",), ("image",)))
    inputs["attention_mask"] = inputs["attention_mask"].masked_fill(visual_mask(inputs), 0)
    unpruned = torch.stack(model.generate(**inputs, **GREEDY).logits)
    policy = HashPolicy()
    with attach(model, policy, schedule=schedule_of(family), mode=mode) as pruner:
        output = model.generate(**inputs, **GREEDY)
        assert pruner.trace == [] and policy.calls == 0
    assert hasattr(output.past_key_values, "_toprl_state") or mode == "mask"
    torch.testing.assert_close(torch.stack(output.logits), unpruned, rtol=0, atol=0 if mode == "compact" else 1e-4)
