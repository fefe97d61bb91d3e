"""The flags of training/ppo.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.rewards import ALPHA_SCHEDULES, REWARD_TERMS, REWARDS
from training.tasks import DTYPES

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
