"""A stage at layer 0: tokens that no layer sees, and a cache that still tells the length of the sequence.

Renumbered positions: against the plain model on inputs that were shortened by hand.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.models.agreement import MIXED, assert_agreement, lengths_of, model_of
from tests.models.conftest import HashPolicy
from tests.models.generating import (
    BATCH,
    NEW_TOKENS,
    SINGLE,
    TOLERANCE,
    assert_pruning_matters,
    assert_same,
    expected_lengths,
    inputs_of,
    more_text,
    pruned,
)
from tests.models.tiny_families import (
    FAMILY_NAMES,
    IMAGE_ID,
    NUM_LAYERS,
    TINY,
    VIDEO_ID,
    build_inputs,
    tiny_family,
    visual_mask,
)
from toprl_models import FastV, Policy, Schedule, StageContext, attach
from toprl_models.probe import decoder_of

FAMILIES = [name for name in FAMILY_NAMES if TINY[name].min_stage == 0]
ONE_DIMENSIONAL = [name for name in FAMILIES if not TINY[name].is_qwen]
SCHEDULE = Schedule(((0, 0.5), (1, 0.25), (5, 2)))
ONCE = Schedule(((0, 0.4),))
STATIC = {"cache_implementation": "static", "disable_compile": True}


class Renumbered(HashPolicy):
    positions = "renumbered"


@pytest.mark.parametrize("family", FAMILIES)
def test_compact_is_mask(family: str) -> None:
    assert_agreement(model_of(family), build_inputs(family, MIXED), SCHEDULE)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_holds_what_was_dropped(family: str) -> None:
    inputs = inputs_of(family)
    output = pruned(family, "compact", inputs, schedule=SCHEDULE)
    assert lengths_of(output.past_key_values) == expected_lengths(output.pruner, inputs, NEW_TOKENS - 1)
    total = inputs["input_ids"].shape[1] + NEW_TOKENS - 1
    assert output.past_key_values.get_seq_length() == total > output.past_key_values.get_seq_length(0)
    assert_same(output, pruned(family, "mask", inputs, schedule=SCHEDULE))
    assert_pruning_matters(output, family)


GENERATIONS: dict[str, dict[str, Any]] = {
    "static cache": STATIC,
    "beams": {"num_beams": 3},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", GENERATIONS.values(), ids=GENERATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family: str, options: dict[str, Any]) -> None:
    inputs = inputs_of(family)
    compact, mask = (pruned(family, mode, inputs, schedule=SCHEDULE, **options) for mode in ("compact", "mask"))
    assert torch.equal(compact.sequences, mask.sequences)
    torch.testing.assert_close(compact.logits, mask.logits, atol=2 * TOLERANCE, rtol=0)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_further_turns(family: str, static: bool) -> None:
    """Text, another image and text again, in which positions and masks go on where the whole sequence ended."""
    is_qwen = tiny_family(family).is_qwen
    inputs, model = inputs_of(family, SINGLE if is_qwen else BATCH), model_of(family)
    rows = len(inputs["input_ids"])
    turns = [
        {"input_ids": more_text(inputs)},
        build_inputs(family, (("image",),) * rows),
        {"input_ids": more_text(inputs, 3)},
    ]
    logits: dict[str, list[Tensor]] = {}
    for mode in ("compact", "mask"):
        config = model.config.get_text_config()
        cache = StaticCache(config=config, max_cache_len=300) if static else DynamicCache(config=config)
        seen, logits[mode] = inputs["attention_mask"], []
        with attach(model, HashPolicy(), schedule=SCHEDULE, mode=mode):
            model(**inputs, past_key_values=cache)
            for turn in turns:
                seen = torch.cat([seen, torch.ones_like(turn["input_ids"])], 1)
                # Qwen2.5-VL computes positions from a mask of the new tokens alone, or none
                known = None if is_qwen else seen
                logits[mode].append(model(**{**turn, "attention_mask": known}, past_key_values=cache).logits[:, -3:])
                assert cache.get_seq_length() == seen.shape[1]
    for compact, mask in zip(logits["compact"], logits["mask"], strict=True):
        torch.testing.assert_close(compact, mask, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_and_cuts_of_the_cache(how: str) -> None:
    inputs, model = inputs_of("llava"), model_of("llava")
    length = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(inputs["input_ids"]), 5, dtype=torch.int64)], 1)
    turn = {"input_ids": more_text(inputs), "attention_mask": mask}
    with attach(model, HashPolicy(), schedule=SCHEDULE):
        cache = model(**inputs, use_cache=True).past_key_values
        twin = copy.deepcopy(cache) if how == "deepcopy" else pickle.loads(pickle.dumps(cache))
        first = model(**turn, past_key_values=twin).logits
        assert (cache.get_seq_length(), twin.get_seq_length()) == (length, length + 5)
        twin.crop(-5)
        assert twin.get_seq_length() == length
        assert torch.equal(model(**turn, past_key_values=twin).logits, first)
        assert torch.equal(model(**turn, past_key_values=cache).logits, first)
        cache.crop(-cache.get_seq_length())
        assert cache.get_seq_length() == 0
        fresh = model(**inputs, past_key_values=cache).logits
        assert torch.equal(fresh, model(**inputs).logits)


def test_a_reset_static_cache_is_empty() -> None:
    inputs, model = inputs_of("llava"), model_of("llava")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=100)
    with attach(model, HashPolicy(), schedule=SCHEDULE):
        first = model(**inputs, past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(**inputs, past_key_values=cache).logits, first)


@pytest.mark.since("5.23")
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_chunks(family: str) -> None:
    inputs = inputs_of(family, (("image",),))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more_text(inputs, 9)], 1)
    extra = inputs["input_ids"].shape[1] - inputs["attention_mask"].shape[1]
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in inputs:
            fill = torch.full((1, extra), int(name == "attention_mask"), dtype=inputs[name].dtype)
            inputs[name] = torch.cat([inputs[name], fill], 1)
    size = int(visual_mask(inputs)[0].nonzero().max()) + 3
    whole, chunks = (pruned(family, "compact", inputs, schedule=SCHEDULE, prefill_chunk_size=n) for n in (None, size))
    if size > inputs["input_ids"].shape[1] - 1:
        pytest.fail("the prompt is one chunk")
    # the first chunk's last token, not the prompt's, is what policies see: HashPolicy looks at neither
    assert_same(chunks, whole)


def test_hidden_states_lie_at_the_places_of_the_prompt() -> None:
    inputs, model = inputs_of("llava"), model_of("llava")
    with attach(model, HashPolicy(), schedule=SCHEDULE) as pruner:
        output = model.base_model(**inputs, output_hidden_states=True)
    assert {states.shape[1] for states in output.hidden_states} == {inputs["input_ids"].shape[1]}
    empty = [(states == 0).all(-1).sum().item() for states in output.hidden_states]
    dropped = [stage.num_visual[row] - stage.counts[row] for stage in pruner.trace for row in range(3)]
    padding = int((inputs["attention_mask"] == 0).sum())
    # what layer 0 was given, what it returned, and what layer 1, behind the second stage, returned
    assert empty[:3] == [sum(dropped[:3]) + padding] * 2 + [sum(dropped[3:6]) + padding]


def test_the_layer_before_has_no_attention_to_read() -> None:
    with pytest.raises(ValueError, match="a stage at layer 0, but FastV reads the attention of the layer before"):
        attach(model_of("llava"), FastV(), schedule=ONCE)


# --- renumbered positions ---


def shortened(model: Any, inputs: dict[str, Tensor], indices: Tensor, row: int) -> dict[str, Tensor]:
    """Embeddings of one row without its padding and without the visual tokens that are not among ``indices``."""
    entered: list[Tensor] = []
    handle = decoder_of(model).register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    visual = visual_mask(inputs)[row] & inputs["attention_mask"][row].bool()
    keep = inputs["attention_mask"][row].bool() & ~visual
    keep[visual.nonzero()[:, 0][indices[indices >= 0]]] = True
    return {"inputs_embeds": entered[0][row : row + 1, keep]}


@pytest.mark.parametrize("family", ONE_DIMENSIONAL)
def test_renumbered_is_the_plain_model_on_a_shorter_prompt(family: str) -> None:
    inputs, model = inputs_of(family), model_of(family)
    output = pruned(family, "compact", inputs, policy=Renumbered(), schedule=ONCE)
    for row in range(len(inputs["input_ids"])):
        plain = generate_text(model, shortened(model, inputs, output.pruner.trace[0].indices[row], row))
        torch.testing.assert_close(output.logits[:, row], plain, atol=TOLERANCE, rtol=0)
    original = pruned(family, "compact", inputs, schedule=ONCE)
    assert (original.logits[0] - output.logits[0])[:2].abs().max() > 1e-2  # rows with images: positions matter
    torch.testing.assert_close(original.logits[:, 2], output.logits[:, 2], atol=TOLERANCE, rtol=0)


def generate_text(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits ``[step, V]`` of a greedy answer, one forward pass over everything per token."""
    embeds, steps = inputs["inputs_embeds"], []
    for _ in range(NEW_TOKENS):
        states = decoder_of(model)(inputs_embeds=embeds, use_cache=False).last_hidden_state
        steps.append(model.lm_head(states[:, -1])[0])
        token = steps[-1].argmax()
        embeds = torch.cat([embeds, model.get_input_embeddings()(token)[None, None]], 1)
    return torch.stack(steps)


def by_hand(model: Any, embeds: Tensor, stages: list[tuple[int, Tensor]]) -> Tensor:
    """Last states of one row where ``stages`` (layer, slots that survive) renumber positions, layer by layer."""
    decoder = decoder_of(model)
    hidden = embeds
    for number, layer in enumerate(decoder.layers):
        for _, slots in (stage for stage in stages if stage[0] == number):
            hidden = hidden[:, slots]
        positions = torch.arange(hidden.shape[1])[None]
        tables = decoder.rotary_emb(hidden, positions)
        hidden = layer(hidden, attention_mask=None, position_embeddings=tables, position_ids=positions)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return decoder.norm(hidden)


@pytest.mark.parametrize("family", ONE_DIMENSIONAL)
def test_each_stage_renumbers(family: str) -> None:
    inputs, model = inputs_of(family, (("image",),)), model_of(family)
    schedule = Schedule(((1, 0.5), (3, 3)))
    with attach(model, Renumbered(), schedule=schedule) as pruner:
        states = model.base_model(**inputs).last_hidden_state
    visual = visual_mask(inputs)[0]
    everything = visual.nonzero()[:, 0]
    alive, stages = torch.arange(len(visual)), []
    for stage in pruner.trace:
        keep = ~visual
        keep[everything[stage.indices[0]]] = True
        slots = torch.nonzero(keep)[:, 0]
        stages.append((stage.layer, torch.searchsorted(alive, slots)))
        alive = slots
    embeds = shortened(model, inputs, torch.arange(len(everything)), 0)["inputs_embeds"]
    expected = by_hand(model, embeds, stages)
    torch.testing.assert_close(states[:, alive], expected, atol=1e-4, rtol=0)


# with older releases a search of beams over images gives other answers without a cache, also without a pruner
BEAMS = pytest.param({"num_beams": 2}, marks=pytest.mark.since("5.23"))


@pytest.mark.parametrize("options", [{}, STATIC, BEAMS], ids=["dynamic", "static", "beams"])
@pytest.mark.parametrize("family", ONE_DIMENSIONAL)
def test_renumbered_decoding_is_a_prefill_again(family: str, options: dict[str, Any]) -> None:
    """With a cache, every segment goes on at its own length; without one the prompt is pruned at each step anew."""
    inputs, schedule = inputs_of(family), Schedule(((0, 0.5), (2, 0.25)))
    # random weights may answer with a placeholder, which older releases without a cache take for one of the prompt's
    options = {**options, "suppress_tokens": [IMAGE_ID, VIDEO_ID]}
    cached = pruned(family, "compact", inputs, policy=Renumbered(), schedule=schedule, **options)
    options = {name: value for name, value in options.items() if name != "cache_implementation"}
    anew = pruned(family, "compact", inputs, policy=Renumbered(), schedule=schedule, use_cache=False, **options)
    assert torch.equal(cached.sequences, anew.sequences)
    torch.testing.assert_close(cached.logits, anew.logits, atol=TOLERANCE, rtol=0)


def test_a_second_image_moves_the_positions_further() -> None:
    inputs, model = inputs_of("llava", (("image",),)), model_of("llava")
    turn = build_inputs("llava", (("image",),), seed=3)
    question = {"input_ids": more_text(inputs)}
    everything = {
        "input_ids": torch.cat([inputs["input_ids"], turn["input_ids"]], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], turn["attention_mask"]], 1),
        "pixel_values": torch.cat([inputs["pixel_values"], turn["pixel_values"]]),
    }
    with attach(model, Renumbered(), schedule=ONCE) as pruner:
        cache = model(**inputs, use_cache=True).past_key_values
        first = pruner.trace[0].indices
        model(**{**turn, "attention_mask": everything["attention_mask"]}, past_key_values=cache)
        second = pruner.trace[0].indices
        found = model(**question, past_key_values=cache).logits
    number = int(visual_mask(inputs).sum())
    kept = torch.cat([first[0], second[0] + number])
    embeds = shortened(model, everything, kept, 0)["inputs_embeds"]
    embeds = torch.cat([embeds, model.get_input_embeddings()(question["input_ids"])], 1)
    plain = model.lm_head(model.get_decoder()(inputs_embeds=embeds).last_hidden_state[:, -5:])
    torch.testing.assert_close(found, plain, atol=TOLERANCE, rtol=0)


def test_m_rope_positions_stay() -> None:
    inputs = inputs_of("qwen2_5_vl")
    renumbered = pruned("qwen2_5_vl", "compact", inputs, policy=Renumbered(), schedule=ONCE)
    assert torch.equal(renumbered.logits, pruned("qwen2_5_vl", "compact", inputs, schedule=ONCE).logits)


def test_refused() -> None:
    model = model_of("llava")
    with pytest.raises(ValueError, match='mode="mask" removes nothing'):
        attach(model, Renumbered(), schedule=ONCE, mode="mask")
    policy = HashPolicy()
    policy.positions = "sinusoidal"
    with pytest.raises(ValueError, match=r"policy\.positions='sinusoidal' must be"):
        attach(model, policy, schedule=ONCE)


# --- what a stage hands to the policy, and takes from it ---


class Curious(Policy):
    """Keeps what it was shown and replaces the states of what it keeps."""

    attention_from = "current"

    def __init__(self, scale: float = 1.0) -> None:
        self.seen: list[tuple[StageContext, Any, Tensor, Tensor]] = []
        self.scale = scale

    def decide(self, context: StageContext) -> Any:
        from toprl_models import Decision

        self.seen.append((context, context.prompt(), context.text_attention(), context.last_attention()))
        return Decision(-context.visual_index.float(), states=self.scale * context.hidden_states)


def test_prompt_and_text_attention() -> None:
    inputs, model = inputs_of("llava"), model_of("llava")
    policy = Curious()
    with attach(model, policy, schedule=Schedule(((2, 0.5), (4, 0.25)))):
        model(**inputs)
    tokens, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    visual = visual_mask(inputs) & valid
    embed = model.get_input_embeddings()
    for context, prompt, attention, last in policy.seen:
        assert torch.equal(context.inputs["pixel_values"], inputs["pixel_values"])
        for row in range(len(tokens)):
            assert int(prompt.visual_valid[row].sum()) == int(visual[row].sum())
            places = visual[row].nonzero()
            behind = tokens[row, int(places.max()) + 1 :] if len(places) else tokens[row, valid[row]]
            count = int(prompt.text_valid[row].sum())
            assert count == len(behind) and not prompt.text[row, count:].any()
            assert torch.equal(prompt.text[row, :count], embed(behind))
            assert not attention[row, count:].any()
            if len(places):
                torch.testing.assert_close(attention[row, count - 1], last[row])
    first, second = (attention for _, _, attention, _ in policy.seen)
    assert first.shape[1] == second.shape[1] and first.shape[2] == 2 * second.shape[2]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", ONE_DIMENSIONAL)
def test_new_states_of_the_kept_tokens_go_on(family: str, layer: int) -> None:
    inputs, model = inputs_of(family), model_of(family)
    results = {}
    for mode in ("compact", "mask"):
        for scale in (1.0, 0.5):
            with attach(model, Curious(scale), schedule=Schedule(((layer, 0.5),)), mode=mode):
                results[mode, scale] = model(**inputs).logits[:, -1]
    for scale in (1.0, 0.5):
        torch.testing.assert_close(results["compact", scale], results["mask", scale], atol=TOLERANCE, rtol=0)
    assert (results["compact", 1.0] - results["compact", 0.5])[:2].abs().max() > 1e-3
    # a stage that drops nothing changes nothing
    with attach(model, Curious(0.5), schedule=Schedule(((layer, 1.0),))):
        untouched = model(**inputs).logits
    assert torch.equal(untouched, model(**inputs).logits)


def test_states_of_a_wrong_shape_are_refused() -> None:
    class Wrong(Curious):
        def decide(self, context: StageContext) -> Any:
            return super().decide(context)._replace(states=context.hidden_states[..., :-1])

    inputs, model = inputs_of("llava"), model_of("llava")
    with attach(model, Wrong(), schedule=ONCE), pytest.raises(ValueError, match="policy Wrong: states has shape"):
        model(**inputs)


def test_lengths_of_every_layer_are_short() -> None:
    output = pruned("llava", "compact", inputs_of("llava"), schedule=ONCE)
    assert len(set(lengths_of(output.past_key_values))) == 1 and len(lengths_of(output.past_key_values)) == NUM_LAYERS
