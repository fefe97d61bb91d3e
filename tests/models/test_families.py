"""Every family: inputs, schedules and what the two modes must agree on."""

from __future__ import annotations

import pytest
import torch

from tests.models import agreement
from tests.models.agreement import (
    MIXED,
    assert_agreement,
    expected_counts,
    generate,
    kept_slots,
    last_states,
    layer_arguments,
    lengths_of,
    model_of,
    schedule_of,
    with_keys,
)
from tests.models.conftest import HashPolicy
from tests.models.features import feature
from tests.models.tiny_families import FIRST_WORD, IMAGE_ID, NUM_LAYERS, Rows, build_inputs, tiny_family, visual_mask
from toprl_models import Schedule, attach
from toprl_models.probe import decoder_of, keyless_layers
from toprl_models.runtime import compact

# row 0 is the longest and has no padding, until it has lost its image
OVERTAKEN = (("image",), (), ())


# --- inputs ---


@feature("images")
@pytest.mark.parametrize("rows", [(("image",),), (("image", "image", "image"),), (("image",), ("image", "image"))])
def test_images(family: str, rows: Rows) -> None:
    assert_agreement(model_of(family), build_inputs(family, rows), schedule_of(family))


@feature("videos")
@pytest.mark.parametrize("rows", [(("video",),), (("video", "image"),), (("video", "video"), (), ("image", "video"))])
def test_videos(family: str, rows: Rows) -> None:
    assert_agreement(model_of(family), build_inputs(family, rows), schedule_of(family))


@feature("left-padded batch with text-only rows")
def test_a_padded_batch_with_text_only_rows(family: str) -> None:
    inputs = build_inputs(family, MIXED)
    assert not inputs["attention_mask"].all()
    compact = assert_agreement(model_of(family), inputs, schedule_of(family))
    plain = agreement.run(model_of(family), inputs)
    torch.testing.assert_close(compact.logits[2], plain.logits[2], atol=agreement.ATOL, rtol=1e-4)


@feature("left-padded batch with text-only rows")
def test_a_batch_is_its_rows(family: str) -> None:
    """Rows of a padded batch keep the tokens and give the answer that they give alone."""
    rows = (*MIXED, ("video", "image")) if tiny_family(family).video else MIXED
    batch, schedule = build_inputs(family, rows), schedule_of(family)
    together = agreement.run(model_of(family), batch, schedule)
    for row in range(len(rows)):
        alone = agreement.run(model_of(family), agreement.single_row(family, batch, rows, row), schedule)
        torch.testing.assert_close(alone.logits[0], together.logits[row], atol=agreement.ATOL, rtol=1e-4)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        for one, all_rows in zip(alone.trace, together.trace, strict=False):
            kept = all_rows.indices[row]
            assert torch.equal(one.indices[0], kept[kept >= 0])


@feature("left-padded batch with text-only rows")
def test_a_batch_of_text_alone_never_asks_the_policy(family: str) -> None:
    model, inputs, policy = model_of(family), build_inputs(family, ((), ())), HashPolicy()
    answer = generate(model, inputs)
    with attach(model, policy, schedule=schedule_of(family)) as pruner:
        same = generate(model, inputs)
    assert torch.equal(same.sequences, answer.sequences)
    assert torch.equal(torch.stack(same.logits), torch.stack(answer.logits))
    assert policy.calls == 0 and not pruner.trace


@feature("right-padded forward")
def test_right_padding(family: str) -> None:
    inputs, states = build_inputs(family, MIXED, padding_side="right"), {}
    plain = last_states(model_of(family), **inputs)
    for mode in ("compact", "mask"):
        states[mode] = agreement.states_of(model_of(family), inputs, schedule_of(family), mode)
    with attach(model_of(family), HashPolicy(), schedule=schedule_of(family)) as pruner:
        model_of(family)(**inputs)
    assert [stage.counts for stage in pruner.trace] == expected_counts(inputs, pruner.schedule)
    alive = kept_slots(inputs, pruner.trace[-1])
    torch.testing.assert_close(states["compact"][alive], states["mask"][alive], atol=agreement.ATOL, rtol=1e-4)
    assert (states["compact"] - plain)[alive].abs().max() > 0.1


@feature("images")
def test_survivors_keep_their_positions(family: str) -> None:
    """Rotary tables of the shortened layers are the prompt's own at the kept slots (M-RoPE's of height and width too),
    and so are the positions."""
    model, inputs = model_of(family), build_inputs(family, (("image", "image"),))
    own = layer_arguments(model, inputs)
    with attach(model, HashPolicy(), schedule=schedule_of(family)) as pruner:
        pruned = layer_arguments(model, inputs)
    for number, stage in enumerate(pruner.trace):
        slots = kept_slots(inputs, stage)[0].nonzero()[:, 0]
        after = pruner.trace[number + 1].layer if number + 1 < len(pruner.trace) else NUM_LAYERS
        for layer in set(range(stage.layer, after)) - keyless_layers(decoder_of(model).layers):
            tables = (pruned[layer]["position_embeddings"], own[layer]["position_embeddings"])
            for table, whole in zip(*tables, strict=True) if isinstance(tables[0], tuple) else [tables]:
                assert torch.equal(table, whole[:, slots])
                assert not torch.equal(table, whole[:, : len(slots)])  # renumbered positions
            for_layer, whole = pruned[layer]["position_ids"], own[layer]["position_ids"]
            assert (for_layer is None) == (whole is None)
            assert whole is None or torch.equal(for_layer, whole[..., slots])


@feature("images")
def test_a_generated_image_id_prunes_nothing(family: str) -> None:
    """Only prompts that bring images are pruned, whatever ids an answer holds."""
    model, inputs, policy = model_of(family), build_inputs(family), HashPolicy()
    with attach(model, policy, schedule=schedule_of(family)) as pruner:
        cache = model(**inputs, use_cache=True).past_key_values
        before = lengths_of(cache)
        assert policy.calls == len(pruner.schedule)
        for phantoms in ([*[IMAGE_ID] * 4, FIRST_WORD], [IMAGE_ID]):
            model(input_ids=torch.tensor([phantoms]), past_key_values=cache)
            assert policy.calls == len(pruner.schedule)
    assert lengths_of(cache) == [n + 6 for n in before]


# --- schedules ---


@feature("keep-all = unattached, bitwise")
@pytest.mark.parametrize("forced", [False, True], ids=["shortcut", "gathered"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [(("image",),), MIXED])
def test_keep_all_is_the_unattached_model(
    family: str, rows: Rows, attn_implementation: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = model_of(family, attn_implementation), build_inputs(family, rows)
    valid = inputs["attention_mask"].bool()
    logits, answer = model(**inputs).logits[valid], generate(model, inputs)
    gathers = []
    if forced:
        monkeypatch.setattr(compact, "drops_nothing", lambda *_: gathers.append(1))
    keep_all = Schedule(((tiny_family(family).min_stage, 1.0), (5, 1.0)))
    with attach(model, HashPolicy(), schedule=keep_all) as pruner:
        assert torch.equal(model(**inputs).logits[valid], logits)
        same = generate(model, inputs)
    assert torch.equal(same.sequences, answer.sequences)
    assert torch.equal(torch.stack(same.logits), torch.stack(answer.logits))
    assert [stage.counts for stage in pruner.trace] == [pruner.trace[0].num_visual] * 2
    assert len(gathers) == (4 if forced else 0)


@feature("keep-all = unattached, bitwise")
def test_keep_all_in_mask_mode_is_the_unattached_model_to_rounding(family: str) -> None:
    model, inputs = model_of(family), build_inputs(family, MIXED)
    plain = agreement.run(model, inputs)
    mask = agreement.run(model, inputs, Schedule(((tiny_family(family).min_stage, 1.0), (5, 1.0))), "mask")
    torch.testing.assert_close(mask.logits, plain.logits, atol=agreement.ATOL, rtol=1e-4)
    assert torch.equal(mask.tokens, plain.tokens)


@feature("compact = mask (Eqs. 6-7)")
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_both_modes_are_transformers_own_attention_without_the_dropped_keys(family: str, padding_side: str) -> None:
    model, inputs = model_of(family, "eager"), build_inputs(family, MIXED, padding_side=padding_side)
    states = {}
    for mode in ("compact", "mask"):
        with attach(model, HashPolicy(), schedule=schedule_of(family), mode=mode) as pruner:
            states[mode] = last_states(model, **inputs)
    by_hand = agreement.masked_by_hand(model, inputs, pruner.trace)
    valid, alive = inputs["attention_mask"].bool(), kept_slots(inputs, pruner.trace[-1])
    # in mask mode dropped tokens go on (Eq. 7), each seeing itself: all rows are comparable
    torch.testing.assert_close(states["mask"][valid], by_hand[valid], atol=agreement.ATOL, rtol=1e-4)
    torch.testing.assert_close(states["compact"][alive], by_hand[alive], atol=agreement.ATOL, rtol=1e-4)
    assert not states["compact"][~alive].any()
    assert (by_hand - last_states(model, **inputs))[alive].abs().max() > 0.1


@feature("stage before the first possible and the last layer")
def test_the_first_and_the_last_possible_stage(family: str) -> None:
    first = tiny_family(family).min_stage
    schedule = Schedule(((first, 0.5), (NUM_LAYERS - 1, 0.25)))
    assert_agreement(model_of(family), build_inputs(family, MIXED), schedule)
    with pytest.raises(ValueError, match=r"layers 0\.\.5"):
        attach(model_of(family), HashPolicy(), schedule=Schedule(((NUM_LAYERS, 0.5),)))
    if first > 1:
        with pytest.raises(ValueError, match=f"can prune before layer {first} at the earliest"):
            attach(model_of(family), HashPolicy(), schedule=Schedule(((first - 1, 0.5),)))


@feature("drop-all and keep-one")
@pytest.mark.parametrize("keeps", [(0,), (1,), (1, 0)])
@pytest.mark.parametrize("rows", [MIXED, OVERTAKEN])
def test_drop_all_and_keep_one(family: str, rows: Rows, keeps: tuple[int, ...]) -> None:
    first = tiny_family(family).min_stage
    schedule = Schedule(tuple((first + 2 * number, keep) for number, keep in enumerate(keeps)))
    inputs = build_inputs(family, rows)
    compact = assert_agreement(model_of(family), inputs, schedule)
    assert [max(stage.counts) for stage in compact.trace] == list(keeps)
    if rows is OVERTAKEN:
        lengths = [mask.sum(1).argmax() for mask in (inputs["attention_mask"], kept_slots(inputs, compact.trace[-1]))]
        assert lengths == [0, 2]


@feature("cache lengths as scheduled")
@pytest.mark.parametrize("rows", [(("image", "image"),), MIXED])
def test_cache_lengths(family: str, rows: Rows) -> None:
    """Each layer stores its segment's tokens, in a ragged batch as many as the longest row has."""
    model, inputs, schedule = model_of(family), build_inputs(family, rows), schedule_of(family)
    visual = visual_mask(inputs).sum(1)
    text = inputs["attention_mask"].sum(1) - visual
    left = {0: visual} | {
        layer: torch.tensor(n) for (layer, _), n in zip(schedule.stages, expected_counts(inputs, schedule), strict=True)
    }
    expected = [int((text + left[max(start for start in left if start <= layer)]).max()) for layer in range(NUM_LAYERS)]
    length, fewer = inputs["input_ids"].shape[1], [expected[layer] for layer in schedule.layers]
    expected = with_keys(model, expected)
    with attach(model, HashPolicy(), schedule=schedule):
        cache = model(**inputs, use_cache=True).past_key_values
        answer = generate(model, inputs)
    assert lengths_of(cache) == expected
    assert [layer.keys.shape[2] for layer in cache.layers if hasattr(layer, "keys")] == expected
    assert length > fewer[0] > fewer[1] > fewer[2]
    assert cache.get_seq_length() == length  # of the sequence, whatever layer 0 holds
    # the last new token is never fed back
    assert lengths_of(answer.past_key_values) == [n + agreement.NEW_TOKENS - 1 for n in expected]
