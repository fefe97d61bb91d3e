"""TopRLPolicy(condition_on="text"): what it sees of the question, in every family and under every kind of padding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.conftest import BATCHES
from tests.models.tiny_families import FAMILY_NAMES, FIRST_WORD, HIDDEN_SIZE, build_inputs, build_model, visual_mask
from toprl_kernels import actor_score, keep_mask_log_prob
from toprl_models import OneShot, Policy, Schedule, StageContext, TopRLPolicy, attach, tiny
from toprl_models.methods.toprl import TEXT_COLUMNS, TEXT_SCORES, text_scores
from toprl_models.policy import TextStates

LAYERS = (2, 3)
ALL, HALF = (Schedule(tuple((layer, keep) for layer in LAYERS)) for keep in (1.0, 0.5))
each_family = pytest.mark.parametrize("family", FAMILY_NAMES)


def make_policy(condition_on: str = "text", **changes: Any) -> TopRLPolicy:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN_SIZE, "stage_layers": list(LAYERS), "actor_size": 8}
    policy = TopRLPolicy(**(sizes | {"condition_on": condition_on} | changes))  # type: ignore[arg-type]
    torch.nn.init.orthogonal_(policy.head.weight)  # a fresh head would hide differences
    return policy


class Watching(Policy):
    """Decides by ``policy`` and keeps the contexts, and what they give when they are asked at once."""

    def __init__(self, policy: TopRLPolicy) -> None:
        self.policy, self.attention_from = policy, policy.attention_from
        self.contexts: list[StageContext] = []
        self.text: list[TextStates] = []
        self.attention: list[Tensor] = []
        self.scores: list[Tensor] = []

    def score(self, context: StageContext) -> Tensor:
        self.contexts.append(context)
        if self.attention_from == "current":
            self.text.append(context.text_states())
            self.attention.append(context.text_attention())
            self.scores.append(text_scores(context))
        return self.policy.score(context)


def by_raster(scores: Tensor, index: Tensor, row: int) -> Tensor:
    """The scores of one row in the order of the tokens, whatever slots they are in."""
    order = index[row].argsort()
    return scores[row][order][index[row][order] >= 0]


def stage_scores(model: Any, inputs: dict[str, Tensor], policy: Policy, schedule: Schedule = ALL, mode="compact"):
    with torch.no_grad(), attach(model, policy, schedule=schedule, mode=mode) as pruner:
        logits = model(**inputs).logits
    return pruner.trace, logits


def another_question(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same prompts, but for the last two words."""
    ids = inputs["input_ids"].clone()
    ids[:, -2:] = FIRST_WORD + (ids[:, -2:] + 7) % 50
    return {**inputs, "input_ids": ids}


@each_family
def test_the_question_decides(family):
    """Same images, two questions: the paper's actor cannot tell them apart, the conditioned one does."""
    model, inputs = build_model(family), build_inputs(family, BATCHES["padded"])
    for condition_on in ("none", "text"):
        traces = [
            stage_scores(model, batch, make_policy(condition_on))[0] for batch in (inputs, another_question(inputs))
        ]
        for one, other in zip(*traces, strict=True):
            for row, number in enumerate(one.num_visual):
                scores = [by_raster(trace.scores, trace.visual_index, row) for trace in (one, other)]
                assert torch.equal(*scores) == (condition_on == "none" or not number)


@each_family
def test_text_states_are_those_behind_the_images(family):
    model, inputs = build_model(family), build_inputs(family, BATCHES["padded"])
    watching = Watching(make_policy())
    stage_scores(model, inputs, watching)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    visual, real = visual_mask(inputs), inputs["attention_mask"].bool()
    for layer, (states, valid) in zip(LAYERS, watching.text, strict=True):
        for row in range(len(real)):
            places = [i for i in range(real.shape[1]) if real[row, i] and not visual[row, i:].any()]
            assert valid[row].tolist() == [True] * len(places) + [False] * (valid.shape[1] - len(places))
            torch.testing.assert_close(states[row, : len(places)], hidden[layer][row, places], rtol=0, atol=1e-5)
            assert not states[row, len(places) :].any()


@each_family
@pytest.mark.parametrize("batch", ["padded", "padded_all"])
def test_compact_equals_mask(family, batch):
    model, inputs = build_model(family), build_inputs(family, BATCHES[batch])
    compact, mask = (stage_scores(model, inputs, make_policy(), HALF, mode) for mode in ("compact", "mask"))
    for one, other in zip(compact[0], mask[0], strict=True):
        assert torch.equal(one.indices, other.indices)
    second, masked = compact[0][1], mask[0][1]
    for row, count in enumerate(compact[0][0].counts):
        if count:
            alive = compact[0][0].indices[row, :count]
            scores = by_raster(masked.scores, masked.visual_index, row)[alive]
            torch.testing.assert_close(by_raster(second.scores, second.visual_index, row), scores, rtol=0, atol=1e-4)
    real = inputs["attention_mask"].bool() & ~visual_mask(inputs)
    torch.testing.assert_close(compact[1][real], mask[1][real], rtol=0, atol=2e-3)


@each_family
def test_side_of_the_padding_changes_nothing(family):
    model = build_model(family)
    traces = [
        stage_scores(model, build_inputs(family, BATCHES["padded"], padding_side=side), make_policy(), HALF)[0]
        for side in ("left", "right")
    ]
    for left, right in zip(*traces, strict=True):
        assert torch.equal(left.indices, right.indices)
        for row in range(2):
            one, other = (by_raster(trace.scores, trace.visual_index, row) for trace in (left, right))
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_a_row_alone_is_the_row_of_a_batch():
    model, inputs = build_model(), build_inputs("llava", BATCHES["padded_all"])
    together = stage_scores(model, inputs, make_policy(), HALF)[0]
    images = 0
    for row, kinds in enumerate(BATCHES["padded_all"]):
        real = inputs["attention_mask"][row].bool()
        alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
        alone["pixel_values"] = inputs["pixel_values"][images : images + len(kinds)]
        images += len(kinds)
        for one, all_rows in zip(stage_scores(model, alone, make_policy(), HALF)[0], together, strict=True):
            scores = by_raster(all_rows.scores, all_rows.visual_index, row)
            torch.testing.assert_close(by_raster(one.scores, one.visual_index, 0), scores, rtol=0, atol=1e-4)


def test_text_scores():
    """Against loops over the samples: largest, mean and last of the text tokens, standardised logarithms."""
    watching = Watching(make_policy())
    stage_scores(build_model(), build_inputs("llava", BATCHES["padded"]), watching, HALF)
    for context, (_, are_text), attention, found in zip(
        watching.contexts, watching.text, watching.attention, watching.scores, strict=True
    ):
        assert found.shape == (*context.valid_mask.shape, TEXT_SCORES)
        assert not found[~context.valid_mask].any()
        for row, valid in enumerate(context.valid_mask):
            if valid.any():
                rows = attention[row][are_text[row]][:, valid]
                for column, one in enumerate((rows.max(0).values, rows.mean(0), rows[-1])):
                    log = (one + 1e-6).log()
                    expected = (log - log.mean()) / (log.var(correction=0) + 1e-4).sqrt()
                    torch.testing.assert_close(found[row, valid, column], expected, rtol=0, atol=1e-4)


def test_what_actor_and_critic_read():
    watching = Watching(make_policy())
    stage_scores(build_model(), build_inputs("llava", BATCHES["padded"]), watching, HALF)
    (states, are_text), context = watching.text[0], watching.contexts[0]
    context = replace(context, text_states=lambda: watching.text[0], text_attention=lambda: watching.attention[0])
    tokens, text = watching.policy.inputs(context)
    assert tokens.shape[2] == text.shape[1] == watching.policy.input_size == 2 * HIDDEN_SIZE + TEXT_COLUMNS
    normed, question, scores, zeros = tokens.split(
        [HIDDEN_SIZE, HIDDEN_SIZE, TEXT_SCORES, TEXT_COLUMNS - TEXT_SCORES], -1
    )
    pooled = torch.stack([one[valid].mean(0) for one, valid in zip(states, are_text, strict=True)])
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(context.hidden_states, (HIDDEN_SIZE,)))
    torch.testing.assert_close(
        question, torch.nn.functional.layer_norm(pooled, (HIDDEN_SIZE,))[:, None].expand_as(question)
    )
    torch.testing.assert_close(scores, (HIDDEN_SIZE / 3) ** 0.5 * watching.scores[0])
    assert not zeros.any()
    torch.testing.assert_close(text[:, : 2 * HIDDEN_SIZE], torch.cat([context.text_state, pooled], 1))
    assert not text[:, 2 * HIDDEN_SIZE :].any()


def test_unconditioned_is_the_state_itself():
    """Bitwise the paper's actor: nothing is normalised, widened or copied on the way to ``actor_score``."""
    watching = Watching(make_policy("none"))
    trace, _ = stage_scores(build_model(), build_inputs(), watching)
    policy, context = watching.policy, watching.contexts[0]
    hidden_states, text_state = policy.inputs(context)
    assert hidden_states is context.hidden_states and text_state is context.text_state
    logits = actor_score(context.hidden_states, 0, policy.actor_weights(), valid_mask=context.valid_mask)
    assert torch.equal(trace[0].scores, logits[..., 0] - logits[..., 1])
    assert policy.input_size == HIDDEN_SIZE and policy.attention_from == "none"


@pytest.mark.parametrize("condition_on", ["none", "text"])
def test_saved_and_loaded(tmp_path, condition_on):
    policy = make_policy(condition_on)
    policy.save_pretrained(tmp_path)
    loaded = TopRLPolicy.from_pretrained(tmp_path)
    assert loaded.condition_on == condition_on
    traces = [stage_scores(build_model(), build_inputs(), one)[0] for one in (policy, loaded)]
    assert all(torch.equal(one.scores, other.scores) for one, other in zip(*traces, strict=True))


def test_a_policy_from_before_the_option_is_unconditioned(tmp_path):
    make_policy("none").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["condition_on"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert TopRLPolicy.from_pretrained(tmp_path).condition_on == "none"


def test_weights_of_the_other_kind_are_refused(tmp_path):
    make_policy("text").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"condition_on": "none"}))
    with pytest.raises(ValueError, match="does not match"):
        TopRLPolicy.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="condition_on='image'"):
        make_policy("image")


def test_gradients_reach_the_weights_of_the_text():
    watching = Watching(make_policy())
    stage_scores(build_model(), build_inputs("llava", BATCHES["padded_all"]), watching)
    policy, context = watching.policy, watching.contexts[0]
    tokens, text = policy.inputs(context)
    assert not tokens.requires_grad
    logits = policy.logits(tokens, 0, context.valid_mask)
    value = policy.value(tokens, 0, context.valid_mask, text, torch.ones(len(text)))
    (logits[..., 0].square().sum() + value.square().sum()).backward()
    question, scores = slice(HIDDEN_SIZE, 2 * HIDDEN_SIZE), slice(2 * HIDDEN_SIZE, 2 * HIDDEN_SIZE + TEXT_SCORES)
    actor, critic = policy.fc1.weight.grad, policy.critic[0].weight.grad
    assert actor is not None and isinstance(critic, Tensor)
    of_text = critic[:, policy.input_size :]  # behind the columns of the tokens' mean
    for gradient in (actor[:, question], actor[:, scores], critic[:, question], of_text[:, question]):
        assert (gradient.abs().amax(0) > 0).all()


@pytest.mark.parametrize("mode", ["compact", "mask"])
def test_no_text_behind_the_image_is_refused(mode):
    model, inputs = build_model(), build_inputs()
    end = int(visual_mask(inputs)[0].nonzero().max()) + 1
    cut = inputs | {name: inputs[name][:, :end] for name in ("input_ids", "attention_mask")}
    stage_scores(model, cut, make_policy("none"), ALL, mode)  # keeps all, and needs no question
    with pytest.raises(ValueError, match=r"prompt 0 ends in a visual token.*append it"):
        stage_scores(model, cut, make_policy(), ALL, mode)


@pytest.mark.since("5.23")
def test_prefill_in_chunks():
    """A chunk's question is what follows in the same chunk; a chunk that ends in the image is refused."""
    model, inputs = build_model(), build_inputs("llava", BATCHES["single"])
    length, end = inputs["input_ids"].shape[1], int(visual_mask(inputs)[0].nonzero().max()) + 1
    found = []
    for size in (None, length, end + 2):
        watching = Watching(make_policy())
        with attach(model, watching, schedule=HALF):
            model.generate(**inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=size)
        found.append(watching)
    for one, other in zip(found[0].text, found[1].text, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert [int(text[1].sum()) for text in found[2].text] == [2, 2]
    with attach(model, make_policy(), schedule=HALF), pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=end)


def test_one_shot_takes_a_conditioned_policy():
    model, inputs = build_model(), build_inputs()
    one_shot = OneShot(make_policy(), LAYERS[0], stage=0)
    traces = [
        stage_scores(model, inputs, policy, schedule)[0]
        for policy, schedule in ((one_shot, Schedule(((LAYERS[0], 4),))), (make_policy(), ALL))
    ]
    assert torch.equal(traces[0][0].scores, traces[1][0].scores)


def test_recorded_actions_have_ratio_one():
    """What a rollout records is enough to evaluate its actions again, the question included."""
    from training.rollout import rollout
    from training.tasks import encode, make_task
    from training.trainer.packed import PackedRollout

    model, processor = tiny.load()
    task = make_task("colour", "train", 6)
    samples = [task[i] for i in range(6)]
    policy = make_policy(hidden_size=tiny.HIDDEN_SIZE, stage_layers=[1, 2, 3])
    schedule = Schedule(((1, 1.0), (2, 1.0), (3, 1.0)))
    episodes = {
        mode: rollout(
            model, processor, policy, schedule, task, samples, encode(processor, task, samples, "cpu"),
            episodes=torch.arange(6), seed=0, tau=1.0, mode=mode,
        )
        for mode in ("compact", "mask")
    }  # fmt: skip
    assert torch.equal(episodes["compact"].retained, episodes["mask"].retained)
    assert episodes["compact"].retained.min() > 0 and episodes["compact"].retained.max() < 1
    for stage, step in enumerate(episodes["compact"].steps):
        log_prob, _ = keep_mask_log_prob(
            policy.logits(step.hidden_states, stage, step.valid_mask), step.keep_mask, previous_mask=step.valid_mask
        )
        torch.testing.assert_close(log_prob, step.log_prob, rtol=0, atol=1e-6)
        value = policy.value(step.hidden_states, stage, step.valid_mask, step.text_state, step.kept_fraction)
        torch.testing.assert_close(value, step.value, rtol=0, atol=1e-6)
    packed = PackedRollout(episodes["compact"].steps).select(torch.arange(6))
    torch.testing.assert_close(packed.evaluate(policy)[0], packed.log_prob, rtol=0, atol=1e-4)
    torch.testing.assert_close(packed.values(policy), packed.value, rtol=0, atol=1e-4)


def test_the_page_shows_the_stored_numbers():
    from training.conditioning import table

    docs = Path(__file__).resolve().parents[2] / "docs"
    stored = json.loads((docs / "results" / "conditioning.json").read_text())
    assert table(stored) in (docs / "conditioning.md").read_text()
