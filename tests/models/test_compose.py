"""Compose: another method at each stage of one schedule, made by hand and by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.agreement import model_of
from tests.models.tiny_families import HIDDEN_SIZE, build_inputs, build_model, visual_mask
from toprl_kernels import flops
from toprl_models import (
    Compose,
    DivPrune,
    FastV,
    OneShot,
    Policy,
    PyramidDrop,
    RandomPolicy,
    Schedule,
    SparseVLM,
    StageContext,
    TopRLPolicy,
    VisionZip,
    attach,
    method_of,
    schedule_for,
)

ROWS = (("image",), ("image", "image"), ())


def learned(*layers: int) -> TopRLPolicy:
    torch.manual_seed(0)
    policy = TopRLPolicy(HIDDEN_SIZE, list(layers), actor_size=8).eval()
    torch.nn.init.normal_(policy.stage_bias)  # so that stages differ
    return policy


class Told(Policy):
    """Keeps the first tokens, and remembers what it was asked."""

    def __init__(self) -> None:
        self.contexts: list[StageContext] = []

    def score(self, context: StageContext) -> Tensor:
        self.contexts.append(context)
        return -context.visual_index.float()


def context_of(stage: int, layer: int, number: int = 12) -> StageContext:
    torch.manual_seed(1)
    states, index = torch.randn(1, number, HIDDEN_SIZE), torch.arange(number)[None]
    nothing: dict[str, Any] = {name: None for name in ("last_attention", "text_attention", "prompt", "inputs")}
    return StageContext(stage, layer, states, index >= 0, index, (number,), (4,), states[:, 0], **nothing)


def test_a_policy_is_told_its_own_stage() -> None:
    told, actor = Told(), learned(2, 4, 5)
    policy = Compose([told, actor, actor])
    for stage, layer, trained in ((1, 2, 0), (1, 4, 1), (2, 5, 2), (1, 3, 2), (2, 0, 2)):
        decision = policy.at_stage(stage).decide(context_of(stage, layer))
        assert torch.equal(decision.scores, actor.decide(context_of(trained, layer)).scores), (stage, layer)
    assert not torch.equal(actor.score(context_of(0, 2)), actor.score(context_of(1, 2)))
    policy.at_stage(0).decide(context_of(0, 0))
    again = Compose([actor, told])
    again.decide(context_of(1, 3))
    assert [(context.stage, context.layer) for context in told.contexts] == [(0, 0), (0, 3)]


def test_a_stage_has_the_attributes_of_its_policy() -> None:
    conditioned = TopRLPolicy(HIDDEN_SIZE, [3], 8, condition_on="text")
    conditioned.bounded_mask_grad = True
    policy = Compose([DivPrune(), FastV(), conditioned, PyramidDrop("original"), learned(5)])
    names = ("attention_from", "positions", "uses_text", "bounded_mask_grad")
    assert [tuple(getattr(policy.at_stage(stage), name) for name in names) for stage in range(5)] == [
        ("none", "renumbered", False, False),
        ("previous", "original", True, False),
        ("current", "original", True, True),
        ("current", "original", True, False),
        ("none", "original", False, False),
    ]
    policy.policies[0].positions = "original"  # may be set later
    assert policy.at_stage(0).positions == "original"


def test_counts_go_on_from_what_was_merged() -> None:
    """SparseVLM makes more tokens of 288 than the schedule says; a later stage keeps no more than there are."""
    schedule = Schedule(((2, 0.5), (8, 0.5), (16, 30)))
    (merged,) = SparseVLM().counts(Schedule(((2, 288),)), 576)
    assert merged > 288
    assert Compose([SparseVLM(), FastV(), FastV()]).counts(schedule, 576) == (merged, 288, 30)
    again = SparseVLM().counts(Schedule(((8, 288),)), merged)
    assert Compose([SparseVLM(), SparseVLM(), FastV()]).counts(schedule, 576) == (merged, *again, 30)
    assert Compose([FastV(), FastV()]).counts(Schedule(((2, 10), (3, 0.5))), 576) == (10, 10)
    assert Compose([DivPrune()]).counts(Schedule(((0, 0.5),)), 0) == (0,)


@pytest.mark.parametrize(
    ("policies", "layers", "message"),
    [
        ((DivPrune(), FastV()), (0,), r"Compose has 2 policies \(DivPrune, FastV\)"),
        ((DivPrune(), FastV()), (0, 2, 3), "Compose has 2 policies"),
        (
            (FastV(), DivPrune()),
            (2, 3),
            r"stages before layers \(3,\), but DivPrune chooses tokens before the language",
        ),
        ((FastV(), RandomPolicy()), (0, 2), "a stage at layer 0, but FastV reads the attention of the layer before"),
        ((DivPrune(), OneShot(FastV(), 2)), (0, 3), r"OneShot\(layer=2\) prunes once"),
        ((DivPrune(), TopRLPolicy(HIDDEN_SIZE // 2, [2], 8)), (0, 2), "trained for hidden_size=32"),
        ((FastV(), VisionZip()), (2, 3), "VisionZip chooses tokens before the language"),
    ],
)
def test_what_does_not_fit_is_refused(policies: tuple[Policy, ...], layers: tuple[int, ...], message: str) -> None:
    schedule = Schedule(tuple((layer, 0.5) for layer in layers))
    with pytest.raises(ValueError, match=message):
        attach(model_of("qwen2_5_vl"), Compose(policies), schedule=schedule)


def test_what_cannot_be_composed() -> None:
    with pytest.raises(ValueError, match="policies is empty"):
        Compose([])
    with pytest.raises(TypeError, match="a Compose within a Compose; list its policies instead"):
        Compose([DivPrune(), Compose([FastV()])])
    with pytest.raises(TypeError, match=r"str is not a toprl_models\.Policy"):
        Compose(["divprune"])  # type: ignore[list-item]


def run(policy: Policy, schedule: Schedule, mode: Any = "compact") -> tuple[Tensor, Any]:
    model, inputs = build_model("llava").double(), build_inputs("llava", ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with attach(model, policy, schedule=schedule, mode=mode) as pruner:
        return model(**inputs).logits[:, -1], pruner


@pytest.mark.parametrize("policy", [FastV, lambda: PyramidDrop("renumbered"), SparseVLM])
def test_the_same_method_at_each_stage_is_the_method(policy: Any) -> None:
    schedule = Schedule(((1, 0.5), (3, 0.25)))
    logits, pruner = run(policy(), schedule)
    composed, other = run(Compose([policy(), policy()]), schedule)
    assert torch.equal(composed, logits)
    assert [stage.counts for stage in other.trace] == [stage.counts for stage in pruner.trace]


def test_stages_are_those_of_their_policies() -> None:
    """Each stage chooses what its policy alone would choose there, after the earlier stages."""
    visual = visual_mask(build_inputs("llava", ROWS)).sum(1).tolist()
    actor = learned(2, 4)
    schedule = Schedule(((0, 0.8), (2, 0.5), (4, 0.25)))
    logits, pruner = run(Compose([DivPrune(), FastV(), actor]), schedule)
    assert [stage.counts for stage in pruner.trace] == [
        tuple(schedule.counts(count)[stage] for count in visual) for stage in range(3)
    ]
    first = run(DivPrune(), Schedule(((0, 0.8),)))[1].trace
    second = run(Compose([DivPrune(), FastV()]), Schedule(((0, 0.8), (2, 0.5))))[1].trace
    assert torch.equal(pruner.trace[0].indices, first[0].indices)
    assert torch.equal(pruner.trace[1].indices, second[1].indices)
    # FastV in the middle: another policy there chooses otherwise
    other, _ = run(Compose([DivPrune(), RandomPolicy(), actor]), schedule)
    assert not torch.allclose(other[:2], logits[:2], atol=1e-3)


def test_both_modes_agree() -> None:
    policy, schedule = Compose([DivPrune(), FastV(), learned(2, 4)]), Schedule(((0, 0.8), (2, 0.5), (4, 0.25)))
    with pytest.raises(ValueError, match='but DivPrune has positions="renumbered"'):
        run(policy, schedule, "mask")
    policy.policies[0].positions = "original"
    compact, mask = run(policy, schedule), run(policy, schedule, "mask")
    torch.testing.assert_close(compact[0], mask[0], atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(compact[1].trace, mask[1].trace, strict=True):
        assert torch.equal(ours.indices, theirs.indices)


def test_a_prompt_that_ends_in_an_image() -> None:
    """May be pruned as long as no policy of it looks at the text."""
    model, inputs = build_model("llava"), build_inputs("llava")
    end = int(visual_mask(inputs).nonzero()[-1, 1]) + 1
    inputs = inputs | {name: inputs[name][:, :end] for name in ("input_ids", "attention_mask")}
    for last, refused in ((learned(2), False), (FastV(), True)):
        with attach(model, Compose([DivPrune(), last]), schedule=Schedule(((0, 0.5), (2, 0.25)))):
            if refused:
                with pytest.raises(ValueError, match="ends in a visual token"):
                    model(**inputs)
            else:
                model(**inputs)


def test_a_merging_method_in_front() -> None:
    visual = visual_mask(build_inputs("llava", ROWS)).sum(1).tolist()
    policy, schedule = Compose([VisionZip(), SparseVLM(), FastV()]), Schedule(((0, 0.8), (2, 0.5), (4, 2)))
    _, pruner = run(policy, schedule)
    rows = [policy.counts(schedule, count) for count in visual]
    assert [stage.counts for stage in pruner.trace] == [tuple(row[stage] for row in rows) for stage in range(3)]
    model = pruner.model
    assert not any(module._forward_pre_hooks for module in model.base_model.multi_modal_projector.modules())


# --- by name ---


def test_names_are_joined_by_plus() -> None:
    method = method_of("divprune+fastv+toprl")
    assert method.title == "DivPrune + FastV + TOP-RL" and method.trained and not method.staged and not method.merges
    assert method.layers(32) == (0, 2, 8)  # TOP-RL's 2 is taken
    assert method.layers(32, trained=(1, 4, 20)) == (0, 2, 4)  # the trained policy's first after it
    actor = learned(1, 4)
    made = method.make((0, 2, 4), actor)
    assert isinstance(made, Compose) and [type(policy) for policy in made.policies] == [DivPrune, FastV, TopRLPolicy]
    assert made.policies[2] is actor
    assert method_of("oneshot+random").make((2, 4), actor).policies[0].policy is actor
    with pytest.raises(ValueError, match="'toprl' needs a trained policy"):
        method.make((0, 2, 4))
    with pytest.raises(ValueError, match="3 stages are needed"):
        method.make((0, 2), actor)
    with pytest.raises(ValueError, match=r"divprune prunes before layers \(0,\), none of them after layer 2"):
        method_of("fastv+divprune").layers(32)
    with pytest.raises(ValueError, match="'fastvv' is unknown"):
        method_of("divprune+fastvv")


@pytest.mark.parametrize("name", ["divprune+fastv", "sparsevlm+pyramiddrop", "visionzip+toprl", "oneshot+random"])
@pytest.mark.parametrize(("num_visual", "num_layers", "budget"), [(576, 32, 192), (64, 6, 24)])
def test_budgets_are_met(name: str, num_visual: int, num_layers: int, budget: int) -> None:
    schedule = schedule_for(name, budget, num_visual=num_visual, num_layers=num_layers)
    assert schedule.layers == method_of(name).layers(num_layers) and len(schedule) == 2
    counts = method_of(name).make(schedule.layers, Policy()).counts(schedule, num_visual)
    average = flops.average_tokens(num_visual, tuple(zip(schedule.layers, counts, strict=True)), num_layers)
    assert average == pytest.approx(budget, abs=3 if "sparsevlm" in name else 1)
