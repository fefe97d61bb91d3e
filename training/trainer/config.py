"""The flags of training/ppo.py."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toprl_models.methods.toprl import CONDITIONS
from training.rewards import ALPHA_SCHEDULES, REWARD_QS, REWARD_TERMS, REWARDS
from training.tasks import DTYPES, QUANTIZATIONS
from training.trainer.log import TRACKERS

RATIO_LEVELS = ("token", "mean", "joint")
OBJECTIVES = ("ppo", "straight_through", "hybrid")
BASELINES = ("critic", "group")
ON_COLLAPSE = ("warn", "stop", "ignore")


# flags that tell how and where a run is done, not what comes out
LOCAL = (
    "output_dir",
    "cache_dir",
    "dataset_path",
    "device",
    "device_map",
    "ddp_timeout",
    "resume",
    "overwrite",
    "dry_run",
    "report_to",
    "save_every",
    "keep_checkpoints",
)


def local_name(path: str) -> str:
    """Name a local file or folder without the place where it lies; other names, as of the Hub, stay."""
    return Path(path).resolve().name if path and Path(path).exists() else path


@dataclass
class PPOConfig:
    """Flags of the script; the paper's values where the paper states them."""

    output_dir: str = field(default="runs/ppo", metadata={"help": "where metrics, checkpoint and policy go"})
    model_name_or_path: str = field(default="tiny", metadata={"help": '"tiny", a Hub id or a local folder'})
    dtype: str = field(default="float32", metadata={"help": "of the model's weights", "choices": list(DTYPES)})
    attn_implementation: str = field(
        default="", metadata={"help": "sdpa, eager, flash_attention_2, ...; empty leaves it to the model"}
    )
    quantization: str = field(
        default="",
        metadata={"help": "of the frozen model's weights; needs bitsandbytes", "choices": ["", *QUANTIZATIONS]},
    )
    device_map: str = field(
        default="", metadata={"help": 'auto, a device, or JSON as {"": 0}, instead of --device; needs accelerate'}
    )
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
    condition_on: str = field(
        default="none",
        metadata={
            "help": "what the actor sees: visual tokens (the paper), or the question too",
            "choices": list(CONDITIONS),
        },
    )
    iterations: int = field(default=40, metadata={"help": "rollout + update rounds"})
    rollout_size: int = field(default=128, metadata={"help": "episodes per iteration"})
    rollout_batch_size: int = field(
        default=0, metadata={"help": "samples that the model answers at once; 0: as many as --rollout_size"}
    )
    cache_dir: str = field(
        default="",
        metadata={"help": "where the unpruned model's Q is kept; empty: cache in --output_dir; runs may share one"},
    )
    feature_cache_mb: float = field(
        default=1024, metadata={"help": "host memory for what the vision tower made of images; 0 keeps nothing"}
    )
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
    reward_q: str = field(
        default="ratio",
        metadata={
            "help": "r^Q: Q_p / Q (Eq. 1), the same of the reference answer's probability, or Q_p itself",
            "choices": list(REWARD_QS),
        },
    )
    budget: float = field(
        default=0.0,
        metadata={"help": "average visual tokens over all layers to train for; 0 leaves the trade-off to Eq. 5"},
    )
    baseline: str = field(
        default="critic",
        metadata={"help": "of the advantages: the critic, or a sample's mean return", "choices": list(BASELINES)},
    )
    group_size: int = field(default=8, metadata={"help": "episodes per sample with --baseline group"})
    objective: str = field(
        default="ppo",
        metadata={"help": "PPO, the relaxed mask's gradient through the model, or both", "choices": list(OBJECTIVES)},
    )
    straight_through_coef: float = field(default=1.0, metadata={"help": "its weight in --objective hybrid"})
    retention_coef: float = field(default=0.1, metadata={"help": "weight of the tokens kept in its loss"})
    ratio_level: str = field(
        default="token",
        metadata={
            "help": "importance ratio per token, per-sample geometric mean, or of the whole mask",
            "choices": list(RATIO_LEVELS),
        },
    )
    clip_range: float = field(default=0.2, metadata={"help": "PPO's epsilon"})
    clip_range_value: float = field(default=0.0, metadata={"help": "the same for the critic's estimates; 0 is off"})
    value_coef: float = field(default=0.5, metadata={"help": "weight of the value loss"})
    entropy_coef: float = field(default=0.003, metadata={"help": "weight of the entropy bonus"})
    max_grad_norm: float = field(default=0.5, metadata={"help": "gradient clipping"})
    target_kl: float = field(default=0.05, metadata={"help": "stop the epochs of an update at this KL; 0 never stops"})
    tau_start: float = field(default=1.0, metadata={"help": "first Gumbel-Softmax temperature"})
    tau_end: float = field(default=0.05, metadata={"help": "last Gumbel-Softmax temperature"})
    save_every: int = field(default=5, metadata={"help": "iterations between checkpoints"})
    keep_checkpoints: int = field(default=2, metadata={"help": "the newest so many stay"})
    eval_every: int = field(
        default=10, metadata={"help": "iterations between validations on held-out samples; 0 never validates"}
    )
    eval_size: int = field(default=64, metadata={"help": "held-out samples"})
    eval_keep: list[float] = field(
        default_factory=list,
        metadata={"help": "share of the tokens that top-k keeps at each stage of a validation; empty: 1/8, 1/16, ..."},
    )
    report_to: str = field(default="tensorboard", metadata={"help": "besides metrics.jsonl", "choices": list(TRACKERS)})
    on_collapse: str = field(
        default="warn", metadata={"help": "what a collapsed policy does, see docs", "choices": list(ON_COLLAPSE)}
    )
    seed: int = field(default=0, metadata={"help": "seed of weights, sampling and data order"})
    device: str = field(default="", metadata={"help": "cpu, cuda, ...; empty picks CUDA where there is one"})
    ddp_timeout: float = field(
        default=1800.0, metadata={"help": "seconds that a process waits for the others of a torchrun"}
    )
    resume: str = field(default="never", metadata={"help": '"auto" continues', "choices": ["never", "auto"]})
    dry_run: bool = field(
        default=False, metadata={"help": "read and check everything, tell what the run would take, and end"}
    )
    overwrite: bool = field(default=False, metadata={"help": "delete the run in --output_dir and start again"})

    def published(self) -> dict[str, Any]:
        """Return the flags that a policy may tell everybody."""
        flags = {name: value for name, value in asdict(self).items() if name not in LOCAL}
        return flags | {"model_name_or_path": local_name(self.model_name_or_path)}

    def __post_init__(self) -> None:
        for name in ("train_size", "iterations", "rollout_size", "ppo_epochs", "minibatch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype} must be one of {', '.join(DTYPES)}")
        for name in ("gamma", "gae_lambda", "eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)} must lie in [0, 1]")
        for name in ("keep_checkpoints", "eval_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.eval_every < 0:
            raise ValueError(f"--eval_every {self.eval_every} must be 0 (never) or more")
        if self.eval_keep and len(self.eval_keep) != len(self.stage_layers):
            raise ValueError(
                f"--eval_keep {self.eval_keep}: one share per stage is needed; --stage_layers {self.stage_layers}"
            )
        shares = [1.0, *self.eval_keep]
        if any(not 0 <= share <= before for before, share in itertools.pairwise(shares)):
            raise ValueError(f"--eval_keep {self.eval_keep}: shares lie in [0, 1] and never grow")
        choices = {
            "report_to": TRACKERS,
            "on_collapse": ON_COLLAPSE,
            "condition_on": CONDITIONS,
            "reward_q": REWARD_QS,
            "baseline": BASELINES,
            "objective": OBJECTIVES,
            "ratio_level": RATIO_LEVELS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)} must be one of {', '.join(known)}")
        coefficients = ("clip_range_value", "straight_through_coef", "retention_coef")
        for name in ("rollout_batch_size", "feature_cache_mb", "budget", *coefficients):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be 0 or more")
        if self.budget and self.reward_terms == "quality":
            raise ValueError(
                f"--budget {self.budget:g} has no meaning with --reward_terms quality; leave one of them out"
            )
        if self.baseline == "group" and (self.group_size < 2 or self.rollout_size % self.group_size):
            raise ValueError(
                f"--group_size {self.group_size} must be at least 2 and divide --rollout_size {self.rollout_size}"
            )
        if self.quantization not in ("", *QUANTIZATIONS):
            raise ValueError(f"--quantization {self.quantization} must be one of {', '.join(QUANTIZATIONS)}")
        if self.device and self.device_map:
            raise ValueError(f"--device {self.device} --device_map {self.device_map}: give one of them")
        if not self.ddp_timeout > 0:
            raise ValueError(f"--ddp_timeout {self.ddp_timeout} must be more than 0 seconds")
        if not 0 < self.tau_end <= self.tau_start:
            raise ValueError(f"--tau_start {self.tau_start} --tau_end {self.tau_end}: need 0 < tau_end <= tau_start")
