"""Every way to decode under pruning: compact mode, mask mode and plain greedy decoding must agree."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor

from tests.models.agreement import keeps_state, lengths_of, model_of, modes_of, schedule_of, with_keys
from tests.models.by_hand import by_hand
from tests.models.conftest import HashPolicy
from tests.models.features import feature
from tests.models.generating import (
    BATCH,
    NEW_TOKENS,
    SINGLE,
    TOLERANCE,
    assert_pruning_matters,
    assert_same,
    generate,
    greedy,
    inputs_of,
    keep_all,
    more_text,
    pruned,
    with_answer,
)
from tests.models.tiny_families import (
    IMAGE_ID,
    NUM_LAYERS,
    TOKEN_ARGUMENTS,
    VIDEO_ID,
    build_inputs,
    build_model,
    tiny_family,
)
from toprl_models import Decision, FastV, Policy, PyramidDrop, RandomPolicy, Schedule, attach
from toprl_models.probe import decoder_of

MODES = ("compact", "mask")


class Force(LogitsProcessor):
    """Makes every row say ``token`` at step ``step``."""

    def __init__(self, prompt: int, step: int, token: int) -> None:
        self.length, self.token = prompt + step, token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.length:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.token] = 0
        return scores


# --- greedy ---


@feature("greedy")
def test_greedy(family: str) -> None:
    compact = greedy(family, "compact")
    assert compact.tokens.shape == (3, NEW_TOKENS)
    assert_same(compact, greedy(family, "mask"))
    assert_pruning_matters(compact, family)
    full = pruned(family, "compact", inputs_of(family), schedule=keep_all(family))
    assert torch.equal(full.logits, greedy(family, "unattached").logits)


@feature("greedy")
def test_two_models_alternate_and_each_answers_twice(family: str) -> None:
    """A Pruner's state belongs to one model and one prompt."""
    inputs = inputs_of(family)
    models = [model_of(family), build_model(family, seed=1)]
    alone = [greedy(family, "compact"), pruned(family, "compact", inputs, model=models[1])]
    short = inputs_of(family, (("image",),))
    with (
        attach(models[0], HashPolicy(), schedule=schedule_of(family)),
        attach(models[1], HashPolicy(), schedule=schedule_of(family)),
    ):
        for _ in range(2):
            for model, expected in zip(models, alone, strict=True):
                assert torch.equal(generate(model, inputs).logits, expected.logits)
            generate(models[0], short, max_new_tokens=2)
    assert not torch.equal(alone[0].tokens, alone[1].tokens)


@feature("greedy")
def test_rows_that_stop_early(family: str) -> None:
    """What stands behind a row's end token must not change, nor be changed by, the rows that go on."""
    inputs, free = inputs_of(family), greedy(family, "compact")
    stop = int(free.tokens[1, 2])
    answers = [pruned(family, mode, inputs, eos_token_id=stop) for mode in MODES]
    assert_same(*answers)
    tokens = answers[0].tokens
    for row in range(3):
        ends = (free.tokens[row] == stop).nonzero().flatten().tolist()
        end = ends[0] + 1 if ends else NEW_TOKENS
        assert torch.equal(tokens[row, :end], free.tokens[row, :end])
        assert (tokens[row, end:] == 0).all()
    assert (tokens[1, 3:] == 0).all() and tokens.shape[1] > 3


@feature("greedy")
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_generated_placeholder_is_no_visual_token(family: str, use_cache: bool) -> None:
    """The second turn of pruning that a model may trigger by answering with the id of an image or a video."""
    inputs = inputs_of(family)
    token = IMAGE_ID if use_cache else VIDEO_ID  # without a cache transformers itself refuses one image too many
    forced = {"logits_processor": [Force(inputs["input_ids"].shape[1], 2, token)], "suppress_tokens": [IMAGE_ID]}
    if use_cache:
        del forced["suppress_tokens"]
    policies = [HashPolicy(), HashPolicy()]
    with_cache = pruned(family, "compact", inputs, policy=policies[0], **forced)
    mode = modes_of(model_of(family))[-1]
    output = pruned(family, mode, inputs, policy=policies[1], use_cache=use_cache, **forced)
    assert (output.tokens[:, 2] == token).all()
    assert_same(output, with_cache)
    assert [policy.calls for policy in policies] == [3, 3]
    short = pruned(family, "compact", inputs, use_cache=use_cache, **forced)
    assert_same(short, with_cache)


# --- sampling, several answers ---


@feature("sampling with a seed")
def test_sampling(family: str) -> None:
    """The same draws give the same tokens: pruning takes no number from torch's generator."""
    inputs, options = inputs_of(family), {"do_sample": True, "temperature": 2.0, "top_k": 20}
    compact, mask = (pruned(family, mode, inputs, **options) for mode in MODES)
    assert_same(compact, mask)
    assert_pruning_matters(compact, family)
    assert not torch.equal(compact.tokens, greedy(family, "compact").tokens)
    full = pruned(family, "compact", inputs, schedule=keep_all(family), **options)
    assert_same(full, generate(model_of(family), inputs, **options))


@feature("num_return_sequences")
# older releases shuffle images between rows
@pytest.mark.parametrize("rows", [(("image",),), pytest.param(BATCH, marks=pytest.mark.since("5.19"))])
def test_several_answers(family: str, rows: tuple) -> None:
    """Every answer has its own row, which is pruned as the prompt is."""
    inputs = inputs_of(family, rows)
    options = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2}
    compact, mask = (pruned(family, mode, inputs, **options) for mode in MODES)
    assert_same(compact, mask)
    if not tiny_family(family).repeats_images and any(row.count("image") > 1 for row in rows):
        unpruned = generate(model_of(family), inputs, **options).logits[0, ::2]
        assert (unpruned - greedy(family, "unattached", rows).logits[0]).abs().max() > 0.1
        return
    first = greedy(family, "compact", rows)
    torch.testing.assert_close(compact.logits[0, ::2], compact.logits[0, 1::2], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(compact.logits[0, ::2], first.logits[0], atol=TOLERANCE, rtol=0)
    assert not torch.equal(compact.tokens[::2], compact.tokens[1::2])
    for stage, expected in zip(compact.pruner.trace, first.pruner.trace, strict=True):
        assert torch.equal(stage.indices, expected.indices.repeat_interleave(2, 0))
    full = pruned(family, "compact", inputs, schedule=keep_all(family), **options)
    assert_same(full, generate(model_of(family), inputs, **options))


# --- beams ---


@feature("beam search")
@pytest.mark.parametrize("do_sample", [False, True])
def test_beam_search(family: str, do_sample: bool) -> None:
    inputs = inputs_of(family)
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": do_sample, "output_scores": True}
    compact, mask = (pruned(family, mode, inputs, **options) for mode in MODES)
    assert torch.equal(compact.tokens, mask.tokens)
    torch.testing.assert_close(compact.sequences_scores, mask.sequences_scores, atol=TOLERANCE, rtol=0)
    unattached = generate(model_of(family), inputs, **options)
    assert (compact.sequences_scores - unattached.sequences_scores).abs().max() > 0.01
    # beams have changed places on the way
    assert (compact.beam_indices.sort(1).values != compact.beam_indices).any()
    full = pruned(family, "compact", inputs, schedule=keep_all(family), **options)
    assert torch.equal(full.tokens, unattached.tokens)


class Draws(Policy):
    """Decides at random, differently for each row, and on its own number of tokens; or as ``first_of`` rows' first."""

    def __init__(self, first_of: int = 1) -> None:
        self.first_of = first_of

    def decide(self, context: Any) -> Decision:
        generator = torch.Generator().manual_seed(context.stage)
        uniform = torch.rand(len(context.valid_mask), max(context.num_visual), generator=generator)
        uniform = uniform[:: self.first_of].repeat_interleave(self.first_of, 0)
        uniform = context.of_original(uniform)
        return Decision(uniform, uniform > 0.5)


@feature("beam search")
def test_beams_share_the_decision_of_a_random_policy(family: str) -> None:
    """The search starts from each sample's first beam; caches change places, and the pruner's masks go with them."""
    inputs, options = inputs_of(family), {"num_beams": 3, "output_scores": True}
    modes = modes_of(model_of(family))
    answers = [pruned(family, mode, inputs, policy=Draws(3), **options) for mode in modes]
    answers += [pruned(family, mode, inputs, policy=Draws(), **options) for mode in modes]
    counts = answers[-1].pruner.trace[0].counts
    assert len(set(counts[:3])) > 1  # the beams of a sample did differ at first
    for answer in answers[1:]:
        assert torch.equal(answer.tokens, answers[0].tokens)
        torch.testing.assert_close(answer.sequences_scores, answers[0].sequences_scores, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_the_random_baseline(num_beams: int) -> None:
    inputs, schedule = inputs_of("llava"), schedule_of("llava")
    answers = [
        pruned("llava", mode, inputs, policy=RandomPolicy(5), schedule=schedule, num_beams=num_beams) for mode in MODES
    ]
    assert torch.equal(answers[0].tokens, answers[1].tokens)


# --- speculative ---


def count_passes(model: Any) -> tuple[list[int], Any]:
    """The lengths of the model's forward passes from now on, and the handle to stop."""
    seen: list[int] = []

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["input_ids"]).shape[1])

    return seen, model.register_forward_pre_hook(note, with_kwargs=True)


class TwoWords(LogitsProcessor):
    """Answers of two words only: drafts are right about every other time."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, 10:12] = scores[:, 10:12]
        return allowed


# weights whose drafts are wrong now and then, where those of seed 1 are all right or all wrong
ASSISTANTS = {"qwen3_vl_moe": 4}


@functools.cache
def assistant_of(family: str) -> Any:
    """A smaller model with other weights."""
    assistant = build_model(family, seed=ASSISTANTS.get(family, 1))
    decoder = decoder_of(assistant)
    decoder.layers = decoder.layers[:2]
    decoder.config.num_hidden_layers = 2
    if hasattr(decoder.config, "layer_types"):
        decoder.config.layer_types = decoder.config.layer_types[:2]
    return assistant


POLICIES = {"hash": HashPolicy, "fastv": FastV, "pyramiddrop": PyramidDrop}
SPECULATIVE = {"logits_processor": [TwoWords()], "max_new_tokens": 16}


def assert_speculation_changes_nothing(family: str, name: str, **speculation: Any) -> None:
    inputs, policy, model = inputs_of(family, SINGLE), POLICIES[name], model_of(family)
    inputs["input_ids"][:, -3:] = torch.tensor([10, 11, 10])  # so that prompt lookup finds something at once
    for mode in modes_of(model) if name == "hash" else ("compact",):
        plain = pruned(family, mode, inputs, policy=policy(), **SPECULATIVE)
        passes, handle = count_passes(model)
        output = pruned(family, mode, inputs, policy=policy(), **SPECULATIVE, **speculation)
        handle.remove()
        assert_same(output, plain)
        for stage, expected in zip(output.pruner.trace, plain.pruner.trace, strict=True):
            assert torch.equal(stage.indices, expected.indices)
        caches = [answer.past_key_values for answer in (output, plain)]
        assert lengths_of(caches[0]) == lengths_of(caches[1])
        prompt = inputs["input_ids"].shape[1]
        assert passes[0] > prompt  # it checked a draft in the prompt's own pass
        assert len(passes) < 16  # some of a draft was right
        assert sum(passes) > prompt + 16  # and some was rolled back
    if name == "hash":
        unattached = generate(model, inputs, **SPECULATIVE, **speculation)
        assert (plain.logits[0] - unattached.logits[0]).abs().max() > 0.1
        full = pruned(family, "compact", inputs, schedule=keep_all(family), **SPECULATIVE, **speculation)
        assert_same(full, unattached)


@feature("assisted decoding")
@pytest.mark.parametrize("name", POLICIES)
def test_an_assistant_changes_nothing(family: str, name: str) -> None:
    """Policies that ask the last token must ask the prompt's, not that of a draft."""
    assert_speculation_changes_nothing(family, name, assistant_model=assistant_of(family))


@feature("prompt lookup")
@pytest.mark.parametrize("name", POLICIES)
def test_prompt_lookup_changes_nothing(family: str, name: str) -> None:
    assert_speculation_changes_nothing(family, name, prompt_lookup_num_tokens=3)


def test_an_assistant_may_be_attached_too() -> None:
    """transformers gives an assistant no images, so there is nothing to prune in it."""
    inputs, assistant, policy = inputs_of("llava", SINGLE), assistant_of("llava"), HashPolicy()
    with attach(assistant, policy, schedule=Schedule(((1, 0.5),))):
        output = pruned("llava", "compact", inputs, assistant_model=assistant, **SPECULATIVE)
    assert_same(output, pruned("llava", "compact", inputs, **SPECULATIVE))
    assert policy.calls == 0


def test_logits_to_keep_alone_is_no_draft() -> None:
    """It saves logits and changes none."""
    inputs, model = inputs_of("llava", SINGLE), model_of("llava")
    with attach(model, FastV(), schedule=schedule_of("llava")):
        assert torch.equal(model(**inputs, logits_to_keep=4).logits, model(**inputs).logits[:, -4:])


# --- prefill in chunks (older releases forget the images) ---


@feature("prefill in chunks")
@pytest.mark.since("5.23")
def test_chunks_behind_the_images(family: str) -> None:
    """Where all images are in the first chunk, the answer is that of one pass."""
    inputs = inputs_of(family)
    size = inputs["input_ids"].shape[1] - 3  # ends in the text behind the images, in every row
    for mode in modes_of(model_of(family)):
        policy = HashPolicy()
        assert_same(pruned(family, mode, inputs, policy=policy, prefill_chunk_size=size), greedy(family, "compact"))
        assert policy.calls == 3
    for any_size in (size, 7):  # keep-all may cut images
        full = pruned(family, "compact", inputs, schedule=keep_all(family), prefill_chunk_size=any_size)
        assert torch.equal(full.logits, generate(model_of(family), inputs, prefill_chunk_size=any_size).logits)


@feature("prefill in chunks")
@pytest.mark.since("5.23")
def test_each_chunk_is_pruned_by_itself(family: str) -> None:
    """Images in different chunks: as if they came in different turns."""
    inputs = inputs_of(family, SINGLE)
    inputs |= {  # words in front: both chunks are of one size
        n: torch.nn.functional.pad(inputs[n], (80, 0), value=v) for n, v in TOKEN_ARGUMENTS.items() if n in inputs
    }
    visual = (inputs["input_ids"] == IMAGE_ID)[0].tolist()
    end = visual.index(False, visual.index(True))
    size = visual.index(True, end)  # the first chunk ends before the second image
    compact, *masks = (pruned(family, mode, inputs, prefill_chunk_size=size) for mode in modes_of(model_of(family)))
    for mask in masks:
        assert_same(compact, mask)
    assert compact.pruner.trace[0].num_visual == (sum(visual[size:]),)
    layer, schedule = with_keys(model_of(family), range(NUM_LAYERS))[-1], schedule_of(family)
    last = sum(stage <= layer for stage in schedule.layers) - 1
    kept = sum(schedule.counts(count)[last] for count in (sum(visual[:size]), sum(visual[size:])))
    assert lengths_of(compact.past_key_values)[-1] == visual.count(False) + kept + NEW_TOKENS - 1
    unattached = generate(model_of(family), inputs, prefill_chunk_size=size)
    assert (compact.logits[0] - unattached.logits[0]).abs().max() > 0.1


@pytest.mark.since("5.23")
@pytest.mark.parametrize("mode", MODES)
def test_a_chunk_that_cuts_an_image_is_refused(mode: str) -> None:
    inputs = inputs_of("llava", SINGLE)
    with pytest.raises(ValueError, match=r"prompt 0 ends in a visual token.*prefill_chunk_size"):
        pruned("llava", mode, inputs, prefill_chunk_size=12)


# --- second turn ---


def converse(model: Any, family: str, first: tuple, second: tuple | None) -> Any:
    """A second turn on the cache of a first one; ``second`` are the rows of its images, None for text alone."""
    inputs = inputs_of(family, first)
    fills = {name: fill for name, fill in TOKEN_ARGUMENTS.items() if name != "input_ids"}
    if second is None:
        more = {"input_ids": more_text(inputs)}
        more |= {name: torch.full_like(more["input_ids"], fill) for name, fill in fills.items()}
    else:
        more = build_inputs(family, second, seed=5)
    cache = DynamicCache(config=model.config.get_text_config())
    answer = generate(model, inputs, past_key_values=cache, max_new_tokens=3).tokens
    between = {"input_ids": answer} | {name: torch.full_like(answer, fill) for name, fill in fills.items()}
    whole = {n: torch.cat([inputs[n], part.to(inputs[n]), more[n]], 1) for n, part in between.items() if n in inputs}
    options = {name: value for name, value in more.items() if name not in between} | whole
    if hasattr(model.base_model, "get_rope_index") and second is not None:
        # generate() would want the grids of all images for the positions, and those of the new ones for the features
        grids = [iter(turn.get("image_grid_thw", ())) for turn in (inputs, more)]
        order = [(turn, image) for rows in zip(first, second, strict=True) for turn in (0, 1) for image in rows[turn]]
        grid = torch.stack([next(grids[turn]) for turn, _ in order])
        place, _ = model.model.get_rope_index(**whole, image_grid_thw=grid)
        count = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
        options["position_ids"] = torch.cat([count[None], place])
    return generate(model, options, past_key_values=cache)


def assert_states_go_on(family: str, first: tuple, second: tuple | None) -> None:
    """Check a second turn where layers keep a state: it goes on where no padding enters that, and is refused else."""
    model, schedule, inputs = model_of(family), schedule_of(family), inputs_of(family, first)
    if second is None:
        with attach(model, HashPolicy(), schedule=schedule):
            answer, found = generate(model, inputs, max_new_tokens=3).tokens, converse(model, family, first, None)
        longer = with_answer(with_answer(inputs, answer), more_text(inputs))
        with by_hand(model, schedule):
            assert_same(found, generate(model, longer))
    else:
        with attach(model, HashPolicy(), schedule=schedule):
            with pytest.raises(ValueError, match="keeps a state of earlier turns"):
                converse(model, family, first, second)
            single = converse(model, family, first[:1], second[-1:])
        plain = converse(model, family, first[:1], second[-1:])
        assert (single.logits[0] - plain.logits[0]).abs().max() > 0.1
        with attach(model, HashPolicy(), schedule=keep_all(family)):
            assert torch.equal(converse(model, family, first[:1], second[-1:]).logits, plain.logits)


NO_IMAGE: tuple = ((), (), ())
TURNS: dict[str, tuple[tuple, tuple | None]] = {
    "text": (BATCH, None),
    "an image": (BATCH, (("image",),) * 3),
    "some images": (BATCH, ((), ("image",), ("image", "image"))),
    "the first images": (NO_IMAGE, (("image",), (), ("image",))),
}


@feature("second turn on the pruned cache")
@pytest.mark.parametrize("kind", TURNS)
def test_second_turn(family: str, kind: str) -> None:
    """A later turn's images are pruned by the same schedule and by themselves; what earlier turns dropped stays so."""
    model, turns = model_of(family), TURNS[kind]
    if keeps_state(model):
        return assert_states_go_on(family, *turns)
    results = {}
    for mode in MODES:
        with attach(model, HashPolicy(), schedule=schedule_of(family), mode=mode) as pruner:
            results[mode] = converse(model, family, *turns)
        if turns[1] is not None:
            visual = (build_inputs(family, turns[1], seed=5)["input_ids"] == IMAGE_ID).sum(1)
            assert pruner.trace[0].num_visual == tuple(visual.tolist())
            assert pruner.trace[2].counts == tuple(visual.clamp(max=2).tolist())
    assert_same(results["compact"], results["mask"])
    plain = converse(model, family, *turns)
    assert (results["compact"].logits[0] - plain.logits[0]).abs().max() > 0.1
    with attach(model, HashPolicy(), schedule=keep_all(family)):
        assert torch.equal(converse(model, family, *turns).logits, plain.logits)
