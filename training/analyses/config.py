"""What ``training/reproduce.py`` can be told, and what an analysis is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from training.analyses.verdicts import Verdict
from training.scenes import KINDS
from training.tasks.benchmarks import BENCHMARKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from training.analyses.lab import Lab

Result = dict[str, Any]
# flags for a 7B model on one GPU, without and with training
LARGE = (
    "--model_name_or_path llava-hf/llava-1.5-7b-hf --device cuda --dtype bfloat16 --batch_size 8 --workers 1 "
    "--output_dir runs/reproduction-7b"
)
LARGE_TRAINED = f"{LARGE} --actor_size 256"
SCENE_LEVELS = dict.fromkeys(KINDS, "perception") | {"count": "reasoning", "compare": "reasoning"}


@dataclass
class ReproduceConfig:
    """Flags of the script. The defaults are for the embedded tiny model on two CPU cores."""

    model_name_or_path: str = field(default="tiny", metadata={"help": '"tiny", a Hub id or a local folder'})
    task: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": "what is asked (docs/tasks.md); both levels are needed"}
    )
    dataset_path: list[str] = field(
        default_factory=list, metadata={"help": "local data instead of the Hub: TASK=PATH for each task"}
    )
    size: int = field(default=256, metadata={"help": "test samples per task"})
    grid_size: int = field(default=96, metadata={"help": "the same for each cell of the sensitivity heat map"})
    budget: list[float] = field(
        default_factory=lambda: [21.34, 14.0],
        metadata={"help": "average visual tokens over all layers, the tighter one last (7B: 192 64)"},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "trainings of every setting"})
    iterations: int = field(default=30, metadata={"help": "PPO iterations per training"})
    train_size: int = field(default=1024, metadata={"help": "training samples"})
    actor_size: int = field(default=64, metadata={"help": "hidden width of the actor (256 for 7B models)"})
    ablation_task: list[str] = field(
        default_factory=lambda: ["count"], metadata={"help": "tasks that the ablations train on"}
    )
    batch_size: int = field(default=128, metadata={"help": "samples per forward pass (8 for 7B models)"})
    dtype: str = field(default="float32", metadata={"help": "of the model's weights"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})
    workers: int = field(default=2, metadata={"help": "processes at once, one thread each; 0 works in this process"})
    output_dir: str = field(
        default="docs/reproduction", metadata={"help": "results/*.json and figures go here, the page beside it"}
    )
    work_dir: str = field(
        default="runs/reproduce", metadata={"help": "trained policies and finished jobs, used again by their settings"}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "make results again that are there already (finished jobs are used again)"}
    )

    def __post_init__(self) -> None:
        for name in ("size", "grid_size", "iterations", "train_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.workers < 0:
            raise ValueError(f"--workers {self.workers} must not be negative")
        for name in ("task", "budget", "seeds", "ablation_task"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} {' '.join(map(str, values))}: give at least one value, none of them twice")
        if self.budget != sorted(self.budget, reverse=True):
            raise ValueError(f"--budget {' '.join(map(str, self.budget))}: the tighter budget must come last")
        for text in self.dataset_path:
            task, mark, _ = text.partition("=")
            if not mark or task not in (*self.task, *self.ablation_task):
                raise ValueError(f"--dataset_path {text}: must be TASK=PATH with TASK one of {', '.join(self.task)}")

    def path_of(self, task: str) -> str | None:
        """--dataset_path of a task."""
        return dict(text.split("=", 1) for text in self.dataset_path).get(task)

    def model(self) -> dict[str, str]:
        """What every job needs to load the model."""
        return {"name": self.model_name_or_path, "dtype": self.dtype, "device": self.device}


@dataclass(frozen=True)
class Analysis:
    """One table or figure of the paper.

    Attributes:
        title: with the paper's number.
        minutes: of work on two idle CPU cores with the default flags; trainings count where they are first needed.
        flags: what the numbers depend on, beside the model; results with other values are made again.
        constants: the same, where it is no flag.
        paper: what the paper says.
        protocol: what is measured here.
        command: flags for a 7B model; empty where another command is named by the page.
        run: computes the result (JSON).
        figure, table, verdicts: made of the result alone.
    """

    name: str
    title: str
    minutes: float
    flags: tuple[str, ...]
    paper: str
    protocol: str
    command: str
    run: Callable[[ReproduceConfig, Lab], Result]
    figure: Callable[[Result], Figure]
    table: Callable[[Result], str]
    verdicts: Callable[[Result], list[Verdict]]
    constants: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, config: ReproduceConfig) -> dict[str, Any]:
        """What its numbers depend on; equal settings need no second run."""
        flags = {name: getattr(config, name) for name in self.flags}
        return {"model": config.model(), **flags, **self.constants}


def level_of(task: str) -> str:
    """Perception or reasoning, after the paper's taxonomy; "both" and "any" for what is neither."""
    if task in SCENE_LEVELS:
        return SCENE_LEVELS[task]
    return BENCHMARKS[task].level if task in BENCHMARKS else "any"


def refuse_one_level(tasks: list[str]) -> None:
    """Raise ValueError where a comparison of perception with reasoning has nothing on one side."""
    levels = {level_of(task) for task in tasks}
    if not {"perception", "reasoning"} <= levels:
        raise ValueError(
            f"--task {' '.join(tasks)}: perception is compared with reasoning, but the levels are {sorted(levels)}"
        )
