"""The losses and gradient steps: packed against padded, several processes against one, the relaxed masks' gradient."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from typing import Any

import pytest
import torch

from tests.models.test_outputs import in_float64
from tests.models.tiny_families import EOS_ID, FAMILY_NAMES, TINY, build_inputs, build_model
from toprl_kernels import masked_attention
from toprl_models import Schedule, TopRLPolicy, masking, tiny
from training import rollout as rollout_module
from training.rollout import Rollout, SamplingPolicy, Step, evaluate_actions, rollout
from training.tasks import Sample, encode, make_task
from training.trainer.config import PPOConfig
from training.trainer.objectives import policy_loss, targets, update, value_loss
from training.trainer.packed import PackedRollout
from training.trainer.ranks import Ranks
from training.trainer.straight_through import StraightThrough
from training.trainer.teacher_forcing import answer_log_prob, pruned_log_prob

STAGES, HIDDEN, WIDTH, EPISODES = 3, 16, 8, 10
LAYERS = (1, 2, 3)


def random_policy() -> TopRLPolicy:
    """No weight is where it starts: the affine part of LayerNorm and the stage biases count."""
    torch.manual_seed(0)
    policy = TopRLPolicy(HIDDEN, list(LAYERS), WIDTH, keep_bias=0.0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return policy


def random_steps(policy: TopRLPolicy) -> list[Step]:
    """Three stages with fewer and fewer tokens; some episodes have none left, some slots are padding."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for stage, width in enumerate((9, 6, 4)):
        valid = torch.rand(EPISODES, width, generator=generator) < (0.9, 0.5, 0.3)[stage]
        step = Step(
            hidden_states=2 * torch.randn(EPISODES, width, HIDDEN, generator=generator) + 1,
            valid_mask=valid,
            keep_mask=(torch.rand(EPISODES, width, generator=generator) < 0.5) & valid,
            log_prob=torch.zeros(EPISODES, width),
            text_state=torch.randn(EPISODES, HIDDEN, generator=generator),
            kept_fraction=torch.rand(EPISODES, generator=generator),
            value=torch.zeros(EPISODES),
        )
        with torch.no_grad():
            log_prob, _, value = evaluate_actions(policy, step, stage)
        steps.append(dataclasses.replace(step, log_prob=log_prob, value=value))
    assert (steps[2].valid_mask.sum(1) == 0).any()
    return steps


@functools.cache  # threads share torch's generator, which the policy is drawn from
def acting() -> tuple[TopRLPolicy, list[Step]]:
    policy = random_policy()
    return policy, random_steps(policy)


def config_of(**changes: Any) -> PPOConfig:
    return PPOConfig(**({"minibatch_size": 4, "ppo_epochs": 2, "target_kl": 0.0} | changes))


def run_update(
    config: PPOConfig, ranks: Ranks | None = None, steps: list[Step] | None = None
) -> tuple[TopRLPolicy, dict[str, float]]:
    """The policy after an update, and its statistics; with ``ranks`` on that process's share of the episodes."""
    policy, ranks = copy.deepcopy(acting()[0]), ranks or Ranks()
    share = torch.arange(EPISODES)[ranks.share(EPISODES)]
    mine = [step.select(share) for step in steps or acting()[1]]
    generator = torch.Generator().manual_seed(2)
    advantages, returns = (torch.randn(EPISODES, STAGES, generator=generator) for _ in range(2))
    episodes = Rollout(mine, torch.zeros(len(share)), torch.zeros(len(share), STAGES), [])
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2, eps=1e-5)
    return policy, update(policy, optimizer, episodes, advantages, returns, config, generator, ranks)


def test_packed_tokens_are_the_padded_ones():
    """Values and gradients, for some of the episodes in another order."""
    rows = torch.tensor([7, 0, 4, 9, 2])
    policy, steps = acting()
    assert any((step.valid_mask[rows].sum(1) == 0).any() for step in steps)
    tokens = PackedRollout(steps).select(rows)
    log_prob, entropy = tokens.evaluate(policy)
    value = tokens.values(policy)
    parts = [evaluate_actions(policy, step.select(rows), stage) for stage, step in enumerate(steps)]
    masks = [step.valid_mask[rows] for step in steps]
    padded = [torch.cat([part[i][mask] for part, mask in zip(parts, masks, strict=True)]) for i in (0, 1)]
    padded.append(torch.cat([part[2] for part in parts]))
    for found, expected in zip((log_prob, entropy, value), padded, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens.log_prob, torch.cat([s.log_prob[rows][m] for s, m in zip(steps, masks, strict=True)]))
    gradients = []
    for results in ((log_prob, entropy, value), padded):
        generator = torch.Generator().manual_seed(4)
        total = sum((result * torch.randn(result.shape, generator=generator)).sum() for result in results)
        gradients.append(torch.autograd.grad(total, list(policy.parameters())))
    for (name, _), found, expected in zip(policy.named_parameters(), *gradients, strict=True):
        assert expected.abs().max() > 1e-3, name
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_policy_loss_by_hand():
    """An episode with two tokens, one with none and one with three."""
    log_ratio = torch.tensor([0.1, -0.6, 0.0, 0.6, -0.5])
    lengths, segment = torch.tensor([2, 0, 3]), torch.tensor([0, 0, 2, 2, 2])
    advantage = torch.tensor([1.0, 5.0, -2.0])
    ratio = log_ratio.exp()
    terms = [min(r, min(max(r, 0.8), 1.2)) for r in ratio[:2].tolist()]  # a gain is capped above
    terms += [min(-2 * r, -2 * min(max(r, 0.8), 1.2)) for r in ratio[2:].tolist()]  # a loss below
    weight = torch.tensor([0.2, 0.2, 0.2])
    loss, statistics = policy_loss(log_ratio, lengths, segment, advantage, weight, config_of(clip_range=0.2))
    assert loss.item() == pytest.approx(-sum(terms) / 5, rel=1e-5)
    assert statistics["clip_fraction"].item() == pytest.approx(3 / 5)
    assert statistics["kl_k1"].item() == pytest.approx(-log_ratio.mean().item(), rel=1e-5)
    assert statistics["kl_k3"].item() == pytest.approx((ratio - 1 - log_ratio).mean().item(), rel=1e-5)
    assert statistics["ratio_mean"].item() == pytest.approx(ratio.mean().item(), rel=1e-5)
    assert statistics["ratio_max"].item() == ratio.max().item()
    weight = torch.tensor([0.5, 0.0, 0.5])
    for level, reduce in (("mean", torch.mean), ("joint", torch.sum)):
        ratios = [reduce(log_ratio[:2]).exp().item(), reduce(log_ratio[2:]).exp().item()]
        terms = [min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratios, (1.0, -2.0), strict=True)]
        loss, _ = policy_loss(log_ratio, lengths, segment, advantage, weight, config_of(ratio_level=level))
        assert loss.item() == pytest.approx(-sum(terms) / 2, rel=1e-5)


def test_targets_by_hand():
    """Weights of three episodes at two stages, the second episode being another process's."""
    advantages = torch.tensor([[1.0, 0.0], [2.0, 1.0], [6.0, 5.0]])
    counts = torch.tensor([[4, 2], [2, 0], [2, 0]])
    mine = torch.tensor([True, False, True])
    found = targets(advantages, 10 * advantages, counts, mine, token_level=True)
    deviation = torch.tensor([-2.0, 3.0, -2.0, 3.0]) / 7**0.5
    torch.testing.assert_close(found.advantage, deviation)
    assert found.returns.tolist() == [10, 60, 0, 50]
    assert found.token_weight.tolist() == pytest.approx([1 / 16, 1 / 16, 1 / 4, 1 / 4])
    assert torch.equal(found.ratio_weight, found.token_weight)
    assert found.row_weight.tolist() == pytest.approx([1 / 6] * 4)
    found = targets(advantages, advantages, counts, mine, token_level=False)
    assert found.ratio_weight.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 2, 0])


def test_value_loss_by_hand():
    value, old, returns = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 1.9, 0.4]), torch.tensor([3.0, 1.0, 0.0])
    assert value_loss(value, old, returns, 0.0).tolist() == pytest.approx([2.0, 0.5, 0.125])
    # the estimate of the first moved by more than 0.2: what counts is the clipped one, 0.2
    assert value_loss(value, old, returns, 0.2).tolist() == pytest.approx([0.5 * 2.8**2, 0.5, 0.125])


class ThreadRanks(Ranks):
    """Processes played by threads: they meet at a barrier, and all read what each has laid down."""

    table: dict[int, Any]
    barrier: threading.Barrier

    def exchange(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.barrier.wait(30)
        values = [self.table[rank] for rank in range(self.size)]
        self.barrier.wait(30)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.exchange(values)).sum(0)

    def gather(self, values: torch.Tensor, total: int) -> torch.Tensor:
        return torch.cat(self.exchange(values))

    def sum_gradients(self, parameters: Any) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        for parameter, *parts in zip(parameters, *self.exchange(gradients), strict=True):
            parameter.grad = torch.stack(parts).sum(0)


def on_threads(size: int, work: Any) -> list[Any]:
    """What ``work(ranks)`` gives, or raises, on each of ``size`` threads."""
    table: dict[int, Any] = {}
    kind = type("Played", (ThreadRanks,), {"table": table, "barrier": threading.Barrier(size)})
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(kind(rank, size))
        except RuntimeError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ratio_level": "mean", "clip_range_value": 0.1},
        {"ratio_level": "joint", "baseline": "group", "rollout_size": 128},
        {"target_kl": 1e-4},
    ],
    ids=["token", "mean_and_value_clip", "joint_and_group", "target_kl"],
)
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_train_the_policy_of_one(size, changes):
    """Minibatches of four out of ten: some hold no episode of a process of four."""
    config = config_of(**changes)
    alone, expected = run_update(config)
    for policy, statistics in on_threads(size, lambda ranks: run_update(config, ranks)):
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(policy.state_dict()[name], value, atol=1e-5, rtol=1e-5)
        assert statistics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    before = acting()[0].state_dict()
    moved = {name for name, value in alone.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name in before if config.baseline == "critic" or not name.startswith("critic")}
    assert moved == trained
    assert expected["epochs"] == (1 if config.target_kl else 2)


def test_two_updates_are_bitwise_equal():
    (first, one), (second, other) = run_update(config_of()), run_update(config_of())
    assert one == other
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize(("objective", "calls"), [("straight_through", 3), ("hybrid", 3)])
def test_the_task_loss_is_in_the_first_pass(objective, calls):
    """Ten episodes in minibatches of four, and two passes of PPO."""
    seen = []

    def task_loss(rows: torch.Tensor, size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        seen.append((len(rows), size))
        loss = policy.head.bias[0] * len(rows) / size
        return loss, {"answer_loss": torch.tensor(len(rows) / size), "relaxed_retention": torch.tensor(0.5)}

    config = config_of(objective=objective, straight_through_coef=100.0, max_grad_norm=1e9, learning_rate=1.0)
    policy, steps = copy.deepcopy(acting()[0]), acting()[1]
    before = copy.deepcopy(policy.state_dict())
    episodes = Rollout(steps, torch.zeros(EPISODES), torch.zeros(EPISODES, STAGES), [])
    zeros = torch.zeros(EPISODES, STAGES)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0 if objective == "straight_through" else 0.01)
    statistics = update(
        policy, optimizer, episodes, zeros, zeros, config, torch.Generator().manual_seed(0), task_loss=task_loss
    )
    assert seen == [(4, 4), (4, 4), (2, 2)] and len(seen) == calls
    assert statistics["answer_loss"] == 1.0 and statistics["relaxed_retention"] == 0.5
    moved = (before["head.bias"] - policy.head.bias.detach())[0].item()
    assert moved == pytest.approx(3.0, abs=1e-5 if objective == "straight_through" else 0.02)
    if objective == "straight_through":
        assert statistics["epochs"] == 1 and statistics["kl_k3"] > 0  # from the second minibatch on
        others = [n for n, p in policy.named_parameters() if n != "head.bias" and not torch.equal(p, before[n])]
        assert not others
    else:
        assert statistics["epochs"] == 2 and statistics["ratio_max"] > 1


def test_a_wrong_ratio_stops_every_process():
    """Only the last process has the episode whose log-probability is off."""
    steps = [dataclasses.replace(step, log_prob=step.log_prob.clone()) for step in acting()[1]]
    assert steps[1].valid_mask[-1].any()
    steps[1].log_prob[-1] += 0.1 * steps[1].valid_mask[-1]
    config = config_of(minibatch_size=EPISODES)
    for error in on_threads(2, lambda ranks: run_update(config, ranks, steps)):
        assert isinstance(error, RuntimeError)
        assert "stage 1: ratio is not 1 before the first step (log gap 1.00e-01)" in str(error)


# --- the straight-through objective ---


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "dpo"}, "--objective dpo must be one of ppo, straight_through, hybrid"),
        ({"baseline": "mean"}, "--baseline mean must be one of critic, group"),
        ({"reward_q": "f1"}, "--reward_q f1 must be one of ratio, prob_ratio, metric"),
        ({"baseline": "group", "group_size": 1}, "--group_size 1 must be at least 2"),
        ({"baseline": "group", "group_size": 5}, "--group_size 5 must .* divide --rollout_size 128"),
        ({"budget": -1.0}, "--budget -1.0 must be 0 or more"),
        ({"budget": 20.0, "reward_terms": "quality"}, "--budget 20 has no meaning with --reward_terms quality"),
        ({"retention_coef": -0.5}, "--retention_coef -0.5 must be 0 or more"),
    ],
)
def test_flags_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**changes)
