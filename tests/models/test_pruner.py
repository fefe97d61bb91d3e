"""The pruner on LLaVA: life cycle, trace, scores of the baselines, refusals. What it computes: test_families.py."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.models.conftest import BATCHES, HashPolicy
from tests.models.tiny_families import IMAGE_ID, build_inputs, build_model
from toprl_models import FastV, Policy, PyramidDrop, RandomPolicy, Schedule, TopRLPolicy, attach
from toprl_models.probe import decoder_of

SCHEDULE = Schedule(((1, 0.5), (3, 0.25), (4, 2)))
KEEP_ALL = Schedule(((1, 1.0), (4, 1.0)))
PADDED = BATCHES["padded"]
NEW_TOKENS = 8


def hooks_of_pruners(model):
    """Hooks of this project; transformers leaves its own output recorders on the layers."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(getattr(h, "__module__", "").startswith("toprl_models") for h in hooks)


def generate(model, inputs):
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)


def test_a_second_turn_on_the_pruned_cache(model):
    """Text after a pruned prompt: the same in both modes."""
    inputs = build_inputs(rows=PADDED)
    more = torch.randint(4, 97, (3, 5), generator=torch.Generator().manual_seed(7))
    logits = {}
    for mode in ("compact", "mask"):
        with attach(model, HashPolicy(), schedule=SCHEDULE, mode=mode):
            cache = model(**inputs, use_cache=True).past_key_values
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
            position_ids = mask.cumsum(1)[:, -5:] - 1
            logits[mode] = model(
                input_ids=more, attention_mask=mask, position_ids=position_ids, past_key_values=copy.deepcopy(cache)
            ).logits
    torch.testing.assert_close(logits["compact"], logits["mask"], atol=2e-4, rtol=1e-4)


def test_detach_leaves_the_model_as_before(model, inputs):
    before = model(**inputs).logits
    implementation = model.config.get_text_config()._attn_implementation
    for mode in ("compact", "mask"):
        pruner = attach(model, HashPolicy(), schedule=SCHEDULE, mode=mode)
        model(**inputs)
        assert pruner.attached
        assert hooks_of_pruners(model) >= 8
        pruner.detach()
        pruner.detach()
        assert not pruner.attached
        assert torch.equal(model(**inputs).logits, before)
    assert model.config.get_text_config()._attn_implementation == implementation
    assert hooks_of_pruners(model) == 0


class Breaks(Policy):
    def __init__(self, error):
        self.error = error

    def score(self, context):
        if context.stage == 1:
            raise self.error
        return context.valid_mask.float()


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), TypeError("odd")])
@pytest.mark.parametrize("mode", ["compact", "mask"])
def test_an_exception_inside_generation_leaves_no_hook(error, mode):
    model, inputs = build_model(), build_inputs(rows=PADDED)
    before = model(**inputs).logits
    expected = RuntimeError if isinstance(error, TypeError) else type(error)
    with pytest.raises(expected), attach(model, Breaks(error), schedule=SCHEDULE, mode=mode):
        generate(model, inputs)
    assert hooks_of_pruners(model) == 0
    assert torch.equal(model(**inputs).logits, before)
    with attach(model, HashPolicy(), schedule=SCHEDULE, mode=mode):
        generate(model, inputs)


def test_the_pruner_survives_an_exception_of_the_policy():
    """Without detaching: the next prompt is pruned as if nothing had happened."""
    model, inputs = build_model(), build_inputs()
    policy = Breaks(ValueError("broken"))
    with attach(model, policy, schedule=SCHEDULE) as pruner:
        with pytest.raises(ValueError, match="broken"):
            generate(model, inputs)
        policy.score = lambda context: context.valid_mask.float()
        generate(model, inputs)
        assert [stage.counts for stage in pruner.trace] == [(8,), (4,), (2,)]


def test_disabled_is_the_unattached_model(model, inputs):
    before = model(**inputs).logits
    for mode in ("compact", "mask"):
        with attach(model, HashPolicy(), schedule=SCHEDULE, mode=mode) as pruner:
            with pruner.disabled():
                assert torch.equal(model(**inputs).logits, before)
            assert not torch.equal(model(**inputs).logits, before)


def test_trace(model):
    inputs = build_inputs(rows=PADDED)
    with attach(model, HashPolicy(), schedule=SCHEDULE) as pruner:
        model(**inputs)
    assert [(s.stage, s.layer, s.counts) for s in pruner.trace] == [
        (0, 1, (8, 16, 0)),
        (1, 3, (4, 8, 0)),
        (2, 4, (2, 2, 0)),
    ]
    first = pruner.trace[0]
    assert first.num_visual == (16, 32, 0)
    scores = HashPolicy().score(type("C", (), {"visual_index": torch.arange(16)[None], "stage": 0})())[0]
    assert first.indices[0].tolist() == sorted(scores.topk(8).indices.tolist()) + [-1] * 8
    for earlier, later in zip(pruner.trace, pruner.trace[1:], strict=False):
        for row in range(3):
            assert set(later.indices[row].tolist()) <= {*earlier.indices[row].tolist(), -1}


def attention_of(model, inputs, layer):
    """Post-softmax attention weights of one layer, from transformers' own eager implementation."""
    model.set_attn_implementation({"text_config": "eager"})
    return model(**inputs, output_attentions=True).attentions[layer]


@pytest.mark.parametrize("rows", [PADDED[:1], PADDED[:2]])
def test_fastv_scores_are_the_models_own_attention(model, rows):
    inputs = build_inputs(rows=rows)
    with attach(model, FastV(), schedule=Schedule(((2, 0.5),))) as pruner:
        model(**inputs)
    trace = pruner.trace[0]
    weights = attention_of(model, inputs, 1)[:, :, -1].mean(1)
    for row in range(len(rows)):
        visual = (inputs["input_ids"][row] == IMAGE_ID).nonzero().flatten()
        found = trace.scores[row][trace.visual_index[row] >= 0]
        torch.testing.assert_close(found, weights[row, visual], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("policy", [FastV(), PyramidDrop()])
def test_the_asking_row_is_the_last_real_token(policy):
    """On either side of the prompt, padding must not be taken for the question."""
    scores = {}
    for side in ("left", "right"):
        inputs = build_inputs(rows=PADDED[:2], padding_side=side)
        with attach(build_model(), policy, schedule=Schedule(((2, 0.5),))) as pruner:
            pruner.model(**inputs)
        scores[side] = pruner.trace[0].scores[0, :16]
    torch.testing.assert_close(scores["left"], scores["right"], atol=1e-6, rtol=1e-4)


def test_pyramiddrop_scores_use_the_layer_that_comes_next(model):
    """The query and key of the stage's layer on its input, by an independent computation."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    inputs = build_inputs()
    with attach(model, PyramidDrop(), schedule=Schedule(((3, 0.5),))) as pruner:
        model(**inputs)
    output = model(**inputs, output_hidden_states=True).hidden_states[3]
    layer = decoder_of(model).layers[3]
    normed = layer.input_layernorm(output)
    query = layer.self_attn.q_proj(normed).view(1, -1, 4, 16).transpose(1, 2)
    key = layer.self_attn.k_proj(normed).view(1, -1, 2, 16).transpose(1, 2)
    rotary = decoder_of(model).rotary_emb(normed, torch.arange(normed.shape[1])[None])
    query, key = (
        apply_rotary_pos_emb(query, repeat_kv(key, 2), *rotary)[0],
        apply_rotary_pos_emb(key, key, *rotary)[1],
    )
    weights = (query[:, :, -1:] @ repeat_kv(key, 2).transpose(2, 3) / 4).softmax(-1).mean(1)[0, 0]
    visual = (inputs["input_ids"][0] == IMAGE_ID).nonzero().flatten()
    torch.testing.assert_close(pruner.trace[0].scores[0], weights[visual], atol=1e-6, rtol=1e-4)


def test_mask_mode_is_differentiable_in_the_keep_mask():
    from toprl_models import Decision

    class Soft(Policy):
        keep = None

        def decide(self, context):
            self.keep = torch.tensor([1.0, 0.0] * 8)[None].requires_grad_()
            return Decision(self.keep.detach(), self.keep)

    model, inputs, policy = build_model(), build_inputs(), Soft()
    with attach(model, policy, schedule=Schedule(((2, 0.5),)), mode="mask"):
        model(**inputs).logits[0, -1].log_softmax(-1)[5].backward()
    gradient = policy.keep.grad
    assert gradient.isfinite().all()
    assert (gradient != 0).sum() > 8


@pytest.mark.parametrize("policy", [FastV(), PyramidDrop(), RandomPolicy(3)])
def test_baselines_generate_in_a_padded_batch(model, policy):
    inputs = build_inputs(rows=PADDED)
    with attach(model, policy, schedule=SCHEDULE) as pruner:
        assert generate(model, inputs).sequences.shape[1] == inputs["input_ids"].shape[1] + NEW_TOKENS
    assert [s.counts for s in pruner.trace] == [(8, 16, 0), (4, 8, 0), (2, 2, 0)]


def test_a_dropped_token_cannot_be_kept_again():
    """A policy that says "keep" of everything at a later stage revives nothing."""
    from toprl_models import Decision

    class Revives(Policy):
        def decide(self, context):
            wanted = context.visual_index % 2 == 0 if context.stage == 0 else torch.ones_like(context.valid_mask)
            return Decision(wanted.float(), wanted)

    model, inputs, logits = build_model(), build_inputs(rows=PADDED[:2]), {}
    for mode in ("compact", "mask"):
        with attach(model, Revives(), schedule=Schedule(((1, 1.0), (3, 1.0))), mode=mode) as pruner:
            logits[mode] = model(**inputs).logits[:, -1]
        assert [stage.counts for stage in pruner.trace] == [(8, 16), (8, 16)]
    torch.testing.assert_close(logits["compact"], logits["mask"], atol=2e-4, rtol=1e-4)


def test_attach_refuses():
    model = build_model()
    schedule = Schedule(((1, 0.5),))
    with attach(model, FastV(), schedule=schedule), pytest.raises(RuntimeError, match="attached already"):
        attach(model, FastV(), schedule=schedule)
    with pytest.raises(TypeError, match="model is a Linear, not a model of transformers"):
        attach(torch.nn.Linear(2, 2), FastV(), schedule=schedule)
    with pytest.raises(ValueError, match=r"layers 0\.\.5"):
        attach(model, FastV(), schedule=Schedule(((6, 0.5),)))
    with pytest.raises(ValueError, match="mode='prune'"):
        attach(model, FastV(), schedule=schedule, mode="prune")
    with pytest.raises(TypeError, match="policy is a str"):
        attach(model, "fastv", schedule=schedule)
    with pytest.raises(TypeError, match="schedule is a tuple"):
        attach(model, FastV(), schedule=((1, 0.5),))
    with pytest.raises(ValueError, match="hidden_size=128"):
        attach(model, TopRLPolicy(128, [1], 8), schedule=schedule)
    with pytest.raises(ValueError, match=r"trained for \(2,\)"):
        attach(model, TopRLPolicy(64, [2], 8), schedule=schedule)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        attach(model, TopRLPolicy(64, [1], 8, base_model={"num_hidden_layers": 5}), schedule=schedule)
    with pytest.raises(ValueError, match=r"policy is on meta.*policy\.to\(model\.device\)"):
        attach(model, TopRLPolicy(64, [1], 8).to("meta"), schedule=schedule)
    assert hooks_of_pruners(model) == 0


def test_images_without_placeholders_are_transformers_error_and_leave_no_state():
    model, inputs = build_model(), build_inputs()
    with attach(model, FastV(), schedule=Schedule(((1, 0.5),))) as pruner:
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            model(input_ids=torch.full((1, 5), 7), pixel_values=inputs["pixel_values"])
        model(**inputs)
        assert pruner.trace[0].counts == (8,)


def test_scores_of_a_wrong_shape_are_refused():
    class Wrong(Policy):
        def score(self, context):
            return context.hidden_states

    with (
        attach(build_model(), Wrong(), schedule=KEEP_ALL) as pruner,
        pytest.raises(ValueError, match="scores has shape"),
    ):
        pruner.model(**build_inputs())
