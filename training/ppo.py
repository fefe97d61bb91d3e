"""Train a TOP-RL pruning policy with PPO.

    python training/ppo.py                                        # ocr on the embedded tiny LLaVA, about a minute
    python training/ppo.py --task shape --stage_layers 1 2 3      # another question kind, other stages
    python training/ppo.py --output_dir runs/ocr --resume auto    # go on where a stopped run was
    python training/ppo.py config.yaml                            # flags from a YAML or JSON file

One iteration is: rollout -> reward (Eq. 5) -> advantages (GAE) -> PPO update. The language model is frozen; actor and
critic learn. Writes metrics.jsonl (what each metric means: docs/training.md), TensorBoard events, checkpoint/ and the
final policy folder, which ``TopRLPolicy.from_pretrained`` loads.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toprl_models import Schedule, TopRLPolicy
from toprl_models.policy import model_signature
from training.rewards import ALPHA_SCHEDULES, REWARD_TERMS, REWARDS, alphas, gae, stage_rewards
from training.rollout import Rollout, evaluate_actions, rollout
from training.tasks import DTYPES, Sample, Task, answer, encode, load_model, make_task

RATIO_LEVELS = ("token", "mean", "joint")


@dataclass
class PPOConfig:
    """Flags of the script; the paper's values where the paper states them."""

    output_dir: str = field(default="runs/ppo", metadata={"help": "where metrics, checkpoint and policy go"})
    model_name_or_path: str = field(default="tiny", metadata={"help": '"tiny", a Hub id or a local folder'})
    dtype: str = field(default="float32", metadata={"help": "of the model's weights", "choices": list(DTYPES)})
    task: str = field(
        default="ocr", metadata={"help": "ocr, shape, colour, exist, count, compare, mixed, or a name of docs/tasks.md"}
    )
    dataset_path: str = field(
        default="", metadata={"help": "local data instead of the Hub; --task custom takes a JSONL or parquet file"}
    )
    metric: str = field(default="", metadata={"help": "the reward's Q where the task has several (custom: needed)"})
    train_size: int = field(default=2048, metadata={"help": "training samples (before those with Q = 0 go)"})
    stage_layers: list[int] = field(
        default_factory=lambda: [1, 2, 3], metadata={"help": "pruning happens before these"}
    )
    actor_size: int = field(default=64, metadata={"help": "hidden width of the actor (256 for 7B models)"})
    iterations: int = field(default=40, metadata={"help": "rollout + update rounds"})
    rollout_size: int = field(default=128, metadata={"help": "episodes per iteration"})
    rollout: str = field(
        default="compact",
        metadata={"help": "drop tokens in rollouts, or mask them (Eqs. 6-7)", "choices": ["compact", "mask"]},
    )
    ppo_epochs: int = field(default=4, metadata={"help": "passes over a rollout"})
    minibatch_size: int = field(default=32, metadata={"help": "episodes per gradient step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "Adam's, annealed linearly to a tenth"})
    gamma: float = field(default=0.9, metadata={"help": "discount factor (Eq. 4)"})
    gae_lambda: float = field(default=0.95, metadata={"help": "bias-variance knob of the advantage estimate"})
    eta: float = field(default=0.95, metadata={"help": "base of alpha_t in Eq. 5"})
    alpha_schedule: str = field(
        default="paper",
        metadata={"help": "alpha_t of Eq. 5, see training/rewards.py", "choices": list(ALPHA_SCHEDULES)},
    )
    reward: str = field(
        default="dense", metadata={"help": "r^Q at every stage or at the last", "choices": list(REWARDS)}
    )
    reward_terms: str = field(
        default="both", metadata={"help": "terms of Eq. 5: r^Q, retention, or both", "choices": list(REWARD_TERMS)}
    )
    ratio_level: str = field(
        default="token",
        metadata={
            "help": "importance ratio per token, per-sample geometric mean, or of the whole mask",
            "choices": list(RATIO_LEVELS),
        },
    )
    clip_range: float = field(default=0.2, metadata={"help": "PPO's epsilon"})
    value_coef: float = field(default=0.5, metadata={"help": "weight of the value loss"})
    entropy_coef: float = field(default=0.003, metadata={"help": "weight of the entropy bonus"})
    max_grad_norm: float = field(default=0.5, metadata={"help": "gradient clipping"})
    target_kl: float = field(default=0.05, metadata={"help": "stop the epochs of an update at this KL; 0 never stops"})
    tau_start: float = field(default=1.0, metadata={"help": "first Gumbel-Softmax temperature"})
    tau_end: float = field(default=0.05, metadata={"help": "last Gumbel-Softmax temperature"})
    save_every: int = field(default=5, metadata={"help": "iterations between checkpoints"})
    seed: int = field(default=0, metadata={"help": "seed of weights, sampling and data order"})
    device: str = field(default="", metadata={"help": "cpu, cuda, ...; empty picks CUDA where there is one"})
    resume: str = field(default="never", metadata={"help": '"auto" continues', "choices": ["never", "auto"]})

    def __post_init__(self) -> None:
        for name in ("train_size", "iterations", "rollout_size", "ppo_epochs", "minibatch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype} must be one of {', '.join(DTYPES)}")
        for name in ("gamma", "gae_lambda", "eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)} must lie in [0, 1]")
        if not 0 < self.tau_end <= self.tau_start:
            raise ValueError(f"--tau_start {self.tau_start} --tau_end {self.tau_end}: need 0 < tau_end <= tau_start")


def unpruned_quality(model: Any, processor: Any, task: Any, samples: list[Sample], batch_size: int) -> Tensor:
    """Q of the unpruned model for each sample, float32 ``[n]`` (Eq. 1's denominator, computed once)."""
    parts = []
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        parts.append(answer(model, processor, task, batch, encode(processor, task, batch, model.device))[1])
    return torch.cat(parts)


class TrainingData(NamedTuple):
    """What episodes are made of: samples of a task, and ``quality`` Q of the unpruned model on each, float32 [n]."""

    task: Task
    samples: list[Sample]
    quality: Tensor


def training_data(model: Any, processor: Any, task: Task, batch_size: int) -> TrainingData:
    """All samples of ``task``, answered once by the unpruned model."""
    samples = [task[i] for i in range(len(task))]
    return TrainingData(task, samples, unpruned_quality(model, processor, task, samples, batch_size))


def normalise(advantages: Tensor) -> Tensor:
    """Zero mean and unit deviation within a minibatch of one stage."""
    if len(advantages) < 2:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, valid: Tensor, advantage: Tensor, config: PPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate over the surviving tokens of one stage.

    Args:
        log_prob, old_log_prob: ``[B, V]``, 0 where a token was dropped before.
        valid: bool ``[B, V]``.
        advantage: ``[B]``.

    Returns:
        The loss and its statistics (clip fraction, k1 and k3 estimates of KL(old || new), largest ratio).
    """
    weight = valid.float()
    tokens = weight.sum(1)
    log_ratio = (log_prob - old_log_prob) * weight
    if config.ratio_level == "token":
        advantage = advantage[:, None].expand_as(log_ratio)
    else:
        log_ratio = log_ratio.sum(1)
        if config.ratio_level == "mean":
            log_ratio = log_ratio / tokens.clamp(min=1)
        weight = (tokens > 0).float()
    log_ratio = log_ratio.clamp(-10, 10)  # exp of an outlier would be infinite
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    total = weight.sum().clamp(min=1)
    with torch.no_grad():
        statistics = {
            "clip_fraction": (((ratio - 1).abs() > config.clip_range) * weight).sum() / total,
            "kl_k1": -(log_ratio * weight).sum() / total,
            "kl_k3": ((ratio - 1 - log_ratio) * weight).sum() / total,
            "ratio_max": (ratio * weight).max() if weight.numel() else ratio.new_tensor(1.0),
        }
    return -(surrogate * weight).sum() / total, statistics


def update(
    policy: TopRLPolicy,
    optimizer: torch.optim.Optimizer,
    episodes: Rollout,
    advantages: Tensor,
    returns: Tensor,
    config: PPOConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """PPO epochs over one rollout; returns the mean of each statistic over the minibatches done."""
    size = len(episodes.quality)
    sums: dict[str, float] = {}
    done, epochs_done, first = 0, 0, True
    for _ in range(config.ppo_epochs):
        kl = 0.0
        for rows in torch.randperm(size, generator=generator).split(config.minibatch_size):
            losses, statistics = [], []
            for stage, step in enumerate(episodes.steps):
                batch = step.select(rows.to(step.value.device))
                log_prob, entropy, value = evaluate_actions(policy, batch, stage)
                if first and not torch.allclose(log_prob, batch.log_prob, atol=1e-4):
                    gap = (log_prob - batch.log_prob).abs().max().item()
                    raise RuntimeError(f"stage {stage}: ratio is not 1 before the first step (log gap {gap:.2e})")
                advantage = normalise(advantages[rows, stage]).to(value.device)
                loss, one = policy_loss(log_prob, batch.log_prob, batch.valid_mask, advantage, config)
                value_loss = 0.5 * (value - returns[rows, stage].to(value.device)).square().mean()
                bonus = entropy.sum() / batch.valid_mask.sum().clamp(min=1)
                losses.append(loss + config.value_coef * value_loss - config.entropy_coef * bonus)
                statistics.append({**one, "policy_loss": loss, "value_loss": value_loss, "entropy": bonus})
            first = False
            optimizer.zero_grad(set_to_none=True)
            torch.stack(losses).mean().backward()
            norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm, error_if_nonfinite=True)
            optimizer.step()
            for name in statistics[0]:
                values = [float(s[name].detach()) for s in statistics]
                mean = max(values) if name == "ratio_max" else sum(values) / len(values)
                sums[name] = sums.get(name, 0.0) + mean
                kl += mean / max(1, size / config.minibatch_size) if name == "kl_k3" else 0.0
            sums["grad_norm"] = sums.get("grad_norm", 0.0) + float(norm)
            done += 1
        epochs_done += 1
        if config.target_kl and kl > config.target_kl:
            break
    return {name: total / done for name, total in sums.items()} | {"epochs": float(epochs_done)}


def save_checkpoint(folder: Path, policy: TopRLPolicy, state: dict[str, Any]) -> None:
    """Write policy and trainer state aside, then swap: a reader never sees a half-written checkpoint."""
    aside, old = folder.with_name("checkpoint.tmp"), folder.with_name("checkpoint.old")
    shutil.rmtree(aside, ignore_errors=True)
    policy.save_pretrained(aside)
    torch.save(state, aside / "trainer_state.pt")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, policy: TopRLPolicy, config: PPOConfig) -> dict[str, Any] | None:
    """The trainer state of the newest whole checkpoint, its weights put into ``policy``; None where there is none."""
    for candidate in (folder, folder.with_name("checkpoint.old")):
        path = candidate / "trainer_state.pt"
        if path.is_file():
            state = torch.load(path, weights_only=True)
            theirs = {k: v for k, v in state["config"].items() if k not in ("resume", "output_dir")}
            ours = {k: v for k, v in asdict(config).items() if k not in ("resume", "output_dir")}
            if theirs != ours:
                different = {k: (theirs.get(k), v) for k, v in ours.items() if theirs.get(k) != v}
                raise ValueError(f"--resume auto: the checkpoint was made with other flags: {different} (theirs, ours)")
            policy.load_state_dict(TopRLPolicy.from_pretrained(candidate).state_dict())
            return state
    return None


class Log:
    """metrics.jsonl and TensorBoard; a resumed run cuts off what it will write again."""

    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        rows = self.path.read_text().splitlines() if iteration and self.path.is_file() else []
        self.path.write_text("".join(row + "\n" for row in rows[:iteration]))
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration or None)

    def write(self, row: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if isinstance(value, list):
                for stage, one in enumerate(value):
                    self.writer.add_scalar(f"{name}/stage_{stage + 1}", one, row["iteration"])
            else:
                self.writer.add_scalar(name, value, row["iteration"])


def main(config: PPOConfig, data: TrainingData | None = None) -> Path:
    """Train; returns the folder of the final policy.

    Args:
        data: what to train on instead of --task's own samples: measured before, or of a task without a name.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)  # data order and minibatches
    sampler = torch.Generator(device).manual_seed(config.seed)  # actions
    model, processor = load_model(config.model_name_or_path, device, getattr(torch, config.dtype))
    schedule = Schedule(tuple((layer, 1.0) for layer in config.stage_layers))
    policy = TopRLPolicy(
        model.config.get_text_config().hidden_size,
        config.stage_layers,
        actor_size=config.actor_size,
        base_model=model_signature(model),
        metadata={"task": config.task, "model": config.model_name_or_path, "ppo": asdict(config)},
    ).to(device)
    policy.check(model, schedule)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, eps=1e-5)
    start = 0
    if config.resume == "auto" and (state := load_checkpoint(folder / "checkpoint", policy, config)):
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        sampler.set_state(state["sampler"])
        start = state["iteration"]
        print(f"resumed after iteration {start}")
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))
    log = Log(folder, start)

    if data is None:
        options = {name: value for name in ("dataset_path", "metric") if (value := getattr(config, name))}
        task = make_task(config.task, "train", config.train_size, seed=config.seed, **options)
        data = training_data(model, processor, task, config.rollout_size)
    task, samples, quality = data
    # Q_p / Q is undefined at Q = 0 (the unpruned model is wrong): those samples teach the actor nothing
    usable = quality.nonzero().flatten()
    if not len(usable):
        raise RuntimeError(
            f"--task {config.task}: the unpruned model answers none of {len(samples)} samples; nothing to learn"
        )
    alpha = alphas(len(config.stage_layers), config.eta, config.alpha_schedule)

    columns = (TextColumn("[bold]{task.fields[task_name]}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[status]}")) as progress:
        bar = progress.add_task("ppo", total=config.iterations, completed=start, task_name=config.task, status="")
        for iteration in range(start, config.iterations):
            began = time.perf_counter()
            fraction = iteration / max(1, config.iterations - 1)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * (1 - 0.9 * fraction)
            # tau 1.0 -> 0.05; it shapes the relaxed gradient only, never the policy's probabilities
            tau = config.tau_start * (config.tau_end / config.tau_start) ** fraction

            # 1. rollout: s_{t+1} = TransformerLayers(m_t, s_t), m_t ~ pi(. | s_t)                        (Eq. 3)
            rows = usable[torch.randint(len(usable), (config.rollout_size,), generator=generator)]
            batch = [samples[i] for i in rows.tolist()]
            episodes = rollout(
                model, processor, policy, schedule, task, batch, generator=sampler, tau=tau, mode=config.rollout
            )

            # 2. reward: r_t = Q_p / Q - alpha_t L_t / L                                               (Eqs. 1, 2, 5)
            share = episodes.quality / quality[rows]
            rewards = stage_rewards(share, episodes.retained, alpha, config.reward, config.reward_terms)

            # 3. advantages of the discounted return sum_t gamma^(t-1) r_t                                  (Eq. 4)
            values = torch.stack([step.value for step in episodes.steps], 1).cpu()
            advantages, returns = gae(rewards, values, config.gamma, config.gae_lambda)

            # 4. PPO update of actor and critic
            statistics = update(policy, optimizer, episodes, advantages, returns, config, generator)

            explained = 1 - (returns - values).var() / returns.var().clamp(min=1e-8)
            row = {
                "iteration": iteration,
                "reward": rewards.sum(1).mean().item(),
                "accuracy": episodes.quality.mean().item(),
                "retained": episodes.retained.mean(0).tolist(),
                "usable": len(usable) / len(samples),
                "explained_variance": explained.item(),
                "tau": tau,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": time.perf_counter() - began,
                **statistics,
            }
            log.write(row)
            kept = "/".join(f"{x:.2f}" for x in row["retained"])
            status = f"reward {row['reward']:.3f} kept {kept} acc {row['accuracy']:.3f} kl {row['kl_k3']:.3f}"
            progress.update(bar, advance=1, status=status)
            if (iteration + 1) % config.save_every == 0 or iteration + 1 == config.iterations:
                state = {
                    "iteration": iteration + 1,
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "sampler": sampler.get_state(),
                    "config": asdict(config),
                }
                save_checkpoint(folder / "checkpoint", policy, state)
    log.writer.close()
    policy.save_pretrained(folder / "policy")
    print(f"{status}\npolicy: {folder / 'policy'}" if start < config.iterations else f"policy: {folder / 'policy'}")
    return folder / "policy"


if __name__ == "__main__":
    parser = HfArgumentParser(PPOConfig, description=__doc__.split("\n")[0])
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        main(parser.parse_yaml_file(sys.argv[1])[0])
    elif len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        main(parser.parse_json_file(sys.argv[1])[0])
    else:
        main(parser.parse_args_into_dataclasses()[0])
