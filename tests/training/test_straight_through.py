"""The straight-through objective: the answer behind the prompt, relaxed masks, the gradient that reaches the actor."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.models.tiny_families import EOS_ID, FAMILY_NAMES, TINY, build_inputs, build_model
from toprl_kernels import masked_attention
from toprl_models import Schedule, TopRLPolicy, tiny
from toprl_models.runtime import mask as masking
from training import rollout as rollout_module
from training.rollout import SamplingPolicy, rollout
from training.tasks import Sample, encode, make_task
from training.trainer.straight_through import RelaxedPolicy, StraightThrough
from training.trainer.teacher_forcing import answer_log_prob, pruned_log_prob

LAYERS = (1, 2, 3)


class Reference:
    """A processor whose answers are numbers: what teacher forcing needs of one."""

    class tokenizer:
        eos_token_id = EOS_ID

        def __new__(cls, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            return {"input_ids": [int(word) for word in text.split()]}


def sample_of(answer: str) -> Sample:
    return Sample("a", None, "", answer)  # type: ignore[arg-type]


SCHEDULE = Schedule(tuple((layer, 1.0) for layer in LAYERS))


def straight_through(model: Any, policy: TopRLPolicy, inputs: dict[str, Any], samples: list[Sample], **changes: Any):
    values = {
        "schedule": SCHEDULE,
        "episodes": torch.arange(len(samples)),
        "seed": 0,
        "tau": 0.7,
        "alpha": torch.tensor([0.5, 0.75, 1.0]),
        "retention_coef": 0.3,
        "budget": 0.0,
        "processor": Reference(),
    } | changes
    return StraightThrough(model=model, policy=policy, samples=samples, inputs=lambda rows: inputs, **values)


@pytest.fixture(scope="module")
def scenes():
    """The embedded model, its processor, six scenes and their inputs."""
    model, processor = tiny.load()
    task = make_task("mixed", "train", 6)
    samples = [task[i] for i in range(6)]
    return model, processor, task, samples, encode(processor, task, samples, "cpu")


def scene_policy(dtype: torch.dtype = torch.float32) -> TopRLPolicy:
    torch.manual_seed(0)
    policy = TopRLPolicy(tiny.HIDDEN_SIZE, list(LAYERS), 16, keep_bias=0.5)
    torch.nn.init.normal_(policy.head.weight, std=0.3)
    return policy.to(dtype)


def test_the_reference_answer_has_the_probability_that_generation_gives_it(scenes):
    model, processor, _, samples, inputs = scenes
    output = model.generate(
        **inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    found = answer_log_prob(model, processor, samples, inputs)
    words = processor.tokenizer
    ids = [[*words(s.answer, add_special_tokens=False)["input_ids"], words.eos_token_id] for s in samples]
    log_prob = torch.stack(output.logits, 1).log_softmax(-1).gather(2, torch.tensor(ids)[..., None])[..., 0]
    right = output.sequences[:, -2] == torch.tensor(ids)[:, 0]
    assert right.sum() >= 4  # where another word came first, the end token was generated behind that one
    torch.testing.assert_close(found[right], log_prob.mean(1)[right], atol=1e-5, rtol=1e-5)


def test_answers_of_different_lengths_do_not_touch_each_other():
    """Nor do they reach the policy: the episodes are those of a rollout without the answers."""
    model = build_model("llava")
    samples = [sample_of("5 6 7 8"), sample_of("9"), sample_of("10 11")]
    inputs = build_inputs("llava", [["image"], ["image", "image"], ["image"]])
    together = answer_log_prob(model, Reference(), samples, inputs)
    logits = []
    for row, answer in enumerate(("5 6 7 8", "9", "10 11")):
        ids = torch.tensor([[int(word) for word in answer.split()] + [EOS_ID]])
        kept = inputs["attention_mask"][row].bool()
        prompt = inputs["input_ids"][row, kept][None]
        images = (1, 2, 1)[row]
        pixels = inputs["pixel_values"][(0, 1, 3)[row] :][:images]
        output = model(input_ids=torch.cat([prompt, ids], 1), pixel_values=pixels).logits[0, prompt.shape[1] - 1 : -1]
        logits.append(output.log_softmax(-1).gather(1, ids[0][:, None]).mean())
    torch.testing.assert_close(together, torch.stack(logits), atol=1e-5, rtol=1e-5)


def test_an_empty_answer_is_refused():
    with pytest.raises(ValueError, match="a: the answer '' has no tokens to learn from; use --objective ppo"):
        answer_log_prob(None, Reference(), [sample_of("")], {"input_ids": torch.zeros(1, 1)})


@pytest.mark.parametrize("mode", ["compact", "mask"])
def test_the_masks_behind_the_reference_are_those_of_the_rollout(scenes, mode):
    model, processor, task, samples, inputs = scenes
    policy, seen = scene_policy(), {}
    options = {"episodes": torch.arange(6) + 5, "seed": 3}
    episodes = rollout(model, processor, policy, SCHEDULE, task, samples, inputs, tau=1.0, mode=mode, **options)
    decide = SamplingPolicy.decide

    def watched(self, context):
        seen[context.stage] = context.text_state
        decision = decide(self, context)
        seen["steps"] = self.steps
        return decision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplingPolicy, "decide", watched)
        log_prob = pruned_log_prob(model, processor, policy, SCHEDULE, samples, inputs, mode=mode, **options)
    for stage, step in enumerate(episodes.steps):
        assert torch.equal(step.keep_mask, seen["steps"][stage].keep_mask)
        torch.testing.assert_close(step.text_state, seen[stage], atol=1e-4, rtol=1e-4)
    loss = straight_through(model, policy, inputs, samples, processor=processor, **options)
    _, statistics = loss(torch.arange(6), 6)
    assert statistics["answer_loss"].item() == pytest.approx(-log_prob.mean().item(), abs=1e-4)
    retained = (episodes.retained @ loss.alpha).mean().item()
    assert statistics["relaxed_retention"].item() == pytest.approx(retained, abs=1e-5)
    assert episodes.retained[:, -1].max() < 0.6


def test_a_mask_hands_its_gradient_to_the_one_before():
    """m_2 = m_1 * sample: what the second stage keeps, the first one is paid or charged for, too."""
    relaxed = RelaxedPolicy(TopRLPolicy(16, list(LAYERS), 8, keep_bias=0.5), seed=0, episodes=torch.arange(2), tau=0.5)
    states = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(5))
    valid, masks = torch.ones(2, 12, dtype=torch.bool), []
    for stage in range(2):
        context = SimpleNamespace(
            stage=stage,
            hidden_states=states,
            text_state=states[:, 0],
            valid_mask=valid,
            visual_index=torch.arange(12).expand(2, -1),
            num_visual=(12, 12),
        )
        masks.append(relaxed.decide(context).keep_mask)  # type: ignore[arg-type]
        valid = masks[-1] > 0
    assert 0 < masks[1].sum() < masks[0].sum() < 24
    assert relaxed.retained[1].tolist() == (masks[1].sum(1) / 12).tolist()
    (found,) = torch.autograd.grad(relaxed.retained[1].sum(), [masks[0]])
    torch.testing.assert_close(found, masks[1].detach() / 12)


def gradient(loss: StraightThrough, size: int) -> list[torch.Tensor]:
    total, _ = loss(torch.arange(size), size)
    actor = [p for n, p in loss.policy.named_parameters() if not n.startswith("critic")]
    return list(torch.autograd.grad(total, actor))


def test_parts_of_a_minibatch_add_up(scenes):
    """Each process has the gradient of its own episodes; two runs are bitwise equal."""
    model, processor, _, samples, inputs = scenes
    policy = scene_policy()
    encoded = {1: inputs, 2: inputs}
    encoded[1] = encode(processor, make_task("mixed", "train", 6), samples[:2], "cpu")
    encoded[2] = encode(processor, make_task("mixed", "train", 6), samples[2:], "cpu")
    whole = gradient(straight_through(model, policy, inputs, samples, processor=processor), 6)
    again = gradient(straight_through(model, policy, inputs, samples, processor=processor), 6)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    parts = []
    for number, rows in ((1, slice(0, 2)), (2, slice(2, 6))):
        numbers = torch.arange(6)[rows]
        loss = straight_through(model, policy, encoded[number], samples[rows], processor=processor, episodes=numbers)
        total, _ = loss(torch.arange(len(numbers)), 6)
        parts.append(torch.autograd.grad(total, [p for n, p in policy.named_parameters() if "critic" not in n]))
    for expected, *summands in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(summands), expected, atol=1e-5, rtol=1e-3)


def test_the_gradient_is_that_of_the_definition(scenes, monkeypatch):
    """Dense Eq. 7 in float64 below the same hard masks."""
    model, processor, _, samples, inputs = scenes
    found = gradient(straight_through(model, scene_policy(), inputs, samples, processor=processor), 6)
    dense = functools.partial(masked_attention, backend="reference", bounded_mask_grad=True)

    def attention(*arguments: Any, **options: Any) -> torch.Tensor:
        return dense(*arguments, **{k: v for k, v in options.items() if k != "bounded_mask_grad"})

    monkeypatch.setattr(masking, "masked_attention", attention)
    double = copy.deepcopy(model).double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    policy = scene_policy(torch.float64)
    expected = gradient(straight_through(double, policy, inputs, samples, processor=processor), 6)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-5
        torch.testing.assert_close(one.double(), other, atol=2e-4 * other.abs().max().item(), rtol=0)


def in_float64(model: Any) -> Any:
    """Return the model in float64 throughout: its RMSNorm casts to float32, too coarse for finite differences."""

    def forward(norm: Any, states: torch.Tensor) -> torch.Tensor:
        return norm.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    for module in model.double().get_decoder().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(forward, module)
    return model


@pytest.mark.parametrize("budget", [0.0, 20.0])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_relaxed_masks_have_the_gradient_of_finite_differences(family, budget, monkeypatch):
    """With soft masks in place of hard ones the loss is smooth in the actor's weights: all that is between, in float64.

    Its derivative is what the hard mask hands to the actor: the same backward pass at other values of the mask.
    """
    sample_keep_mask = rollout_module.sample_keep_mask

    def soft(logits: torch.Tensor, **options: Any) -> Any:
        sample = sample_keep_mask(logits.detach(), **options)
        noise = torch.rand(logits.shape[:2], generator=torch.Generator().manual_seed(0), dtype=logits.dtype).logit()
        mask = torch.sigmoid((logits[..., 0] - logits[..., 1] + noise) / options["tau"])
        return sample._replace(keep_mask=mask * options["previous_mask"])

    monkeypatch.setattr(rollout_module, "sample_keep_mask", soft)
    model = in_float64(build_model(family))
    inputs = build_inputs(family, [["image"], ["image"]])
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    first = max(TINY[family].min_stage, 1)
    layers = (first, first + 1, first + 2)
    torch.manual_seed(0)
    policy = TopRLPolicy(64, list(layers), 8, keep_bias=0.5).double()
    torch.nn.init.normal_(policy.head.weight, std=0.3)
    schedule = Schedule(tuple((layer, 1.0) for layer in layers))
    samples = [sample_of("5 6 7"), sample_of("9")]
    loss = straight_through(model, policy, inputs, samples, schedule=schedule, budget=budget)
    rows = torch.arange(2)
    total, _ = loss(rows, 2)
    actor = [p for n, p in policy.named_parameters() if not n.startswith("critic")]
    found = torch.autograd.grad(total, actor)
    directions = [torch.randn_like(p) for p in actor]
    slope = sum((g * d).sum() for g, d in zip(found, directions, strict=True)).item()
    values = []
    with torch.no_grad():
        for step in (1e-5, -1e-5):
            for parameter, direction in zip(actor, directions, strict=True):
                parameter += step * direction
            values.append(loss(rows, 2)[0].item())
            for parameter, direction in zip(actor, directions, strict=True):
                parameter -= step * direction
    assert abs(slope) > 1e-2
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)
