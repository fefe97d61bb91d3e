"""What ``training/evaluate.py`` can be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toprl_models import Schedule, plugins, schedule_for
from toprl_models.registry import Method
from training.evaluation.methods import METHODS, row_for
from training.tasks import DTYPES, QUANTIZATIONS


@dataclass
class EvaluateConfig:
    """Flags of the script."""

    model_name_or_path: str = field(
        default="",
        metadata={"help": '"tiny", a Hub id or a local folder; empty takes the one that the policy was trained on'},
    )
    task: list[str] = field(
        default_factory=list, metadata={"help": "names (docs/tasks.md); empty takes those the policies were trained on"}
    )
    method: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"of {', '.join([*METHODS, *plugins.names()])}; empty takes "
            f"{', '.join(name for name, row in METHODS.items() if row.default)} "
            "as far as --policy is given; full always runs. Also a class of your own, my_file.py:MyMethod, and several "
            "methods that follow each other, divprune+fastv"
        },
    )
    policy: list[str] = field(
        default_factory=list, metadata={"help": "policy folders or Hub ids; several of one task are its seeds"}
    )
    budget: list[float] = field(
        default_factory=list, metadata={"help": "average visual tokens over all layers; each is a block of the table"}
    )
    keep: list[int] = field(default_factory=list, metadata={"help": "instead of --budget: tokens kept by each stage"})
    stages: list[int] = field(
        default_factory=list,
        metadata={
            "help": "layers that methods of several stages prune before; empty takes the policy's, else the paper's or "
            "the authors', scaled to the depth"
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "runs of methods that draw (random, untrained)"}
    )
    output_dir: str = field(
        default="", metadata={"help": "where everything goes; empty makes a folder beside the first policy"}
    )
    limit: int = field(
        default=0, metadata={"help": "at most so many samples per task; 0 takes all (of the endless scenes 512)"}
    )
    data_seed: int = field(default=0, metadata={"help": "which samples --limit takes; of scenes, which ones are drawn"})
    dataset_path: list[str] = field(
        default_factory=list, metadata={"help": "local data instead of the Hub: PATH, or TASK=PATH for each of several"}
    )
    task_option: list[str] = field(
        default_factory=list,
        metadata={"help": "further options of make_task: TASK.OPTION=VALUE, e.g. textvqa.ocr_hints=true"},
    )
    batch_size: int = field(
        default=0, metadata={"help": "samples per forward pass; 0 takes 128 for the tiny model and 8 for others"}
    )
    dtype: str = field(default="float32", metadata={"help": "of the model's weights", "choices": list(DTYPES)})
    attn_implementation: str = field(
        default="", metadata={"help": "sdpa, eager, flash_attention_2, ...; empty leaves it to the model"}
    )
    quantization: str = field(
        default="", metadata={"help": "of the model's weights; needs bitsandbytes", "choices": ["", *QUANTIZATIONS]}
    )
    device: str = field(default="", metadata={"help": "cpu, cuda, ...; empty picks CUDA where there is one"})
    device_map: str = field(
        default="", metadata={"help": 'auto, a device, or JSON as {"": 0}, instead of --device; needs accelerate'}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "read and check everything, tell what the run would take, and end"}
    )
    overwrite: bool = field(default=False, metadata={"help": "delete the results in --output_dir and start again"})

    def __post_init__(self) -> None:
        for name in self.method:
            try:
                row = row_for(name)
            except ValueError as error:
                raise ValueError(f"--method {name}: {error}") from error
            if row.needs_policy and not self.policy:
                raise ValueError(f"--method {name} needs --policy FOLDER: the actor that training/ppo.py writes")
        for flag in ("task", "method", "policy", "budget", "seeds"):
            values = getattr(self, flag)
            if len(set(values)) < len(values):
                raise ValueError(f"--{flag} {' '.join(map(str, values))}: a value is given twice")
        if not self.seeds:
            raise ValueError("--seeds is empty; give at least one")
        if self.limit < 0 or self.batch_size < 0:
            raise ValueError(f"--limit {self.limit} --batch_size {self.batch_size}: must not be negative")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype} must be one of {', '.join(DTYPES)}")
        if self.quantization not in ("", *QUANTIZATIONS):
            raise ValueError(f"--quantization {self.quantization} must be one of {', '.join(QUANTIZATIONS)}")
        if self.device and self.device_map:
            raise ValueError(f"--device {self.device} --device_map {self.device_map}: give one of them")
        scheduled = [name for name in self.methods() if row_for(name).scheduled]
        if (self.keep and self.budget) or (scheduled and not self.keep and not self.budget):
            raise ValueError("give either --keep (tokens per stage) or --budget (average tokens over all layers)")

    def methods(self) -> list[str]:
        """The methods to run, in the table's order; those that are not in METHODS come last."""
        runnable = [name for name, row in METHODS.items() if row.default and (self.policy or not row.needs_policy)]
        asked = self.method or runnable
        others = [name for name in asked if name not in METHODS]
        return [*(name for name in METHODS if name in asked or name == "full"), *others]

    def budgets(self) -> list[str]:
        """How the blocks are called in all files: "192", or "8/4/2" for what --keep says."""
        return ["/".join(map(str, self.keep))] if self.keep else [f"{budget:g}" for budget in self.budget]

    def schedule(
        self,
        budget: str,
        method: Method,
        layers: Sequence[int],
        keep_layers: Sequence[int],
        num_visual: int,
        depth: int,
    ) -> Schedule:
        """The schedule of ``method`` for one of ``budgets()``.

        Args:
            layers: where the method prunes.
            keep_layers: where methods of several stages prune, which --keep speaks of; other methods get its average.
            num_visual: visual tokens of a sample; where samples differ, their mean.
            depth: decoder layers.

        Raises:
            ValueError: impossible budget (the message states the floor), or not one number of --keep per stage.
        """
        average = 0.0 if self.keep else float(budget)
        if self.keep:
            if len(self.keep) != len(keep_layers):
                raise ValueError(
                    f"--keep {budget}: pruning happens before layers {tuple(keep_layers)}: {len(keep_layers)} numbers "
                    "are needed"
                )
            kept = Schedule(tuple(zip(keep_layers, self.keep, strict=True)))
            if method.staged:
                return kept
            average = kept.average_tokens(num_visual, depth)
        return schedule_for(method.name, average, num_visual=num_visual, num_layers=depth, layers=tuple(layers))

    def task_arguments(self, name: str, tasks: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of ``make_task`` for one of ``tasks``.

        Raises:
            ValueError: --dataset_path or --task_option does not say which of the tasks it is for.
        """
        found: dict[str, Any] = {}
        for text in self.dataset_path:
            task, mark, path = text.partition("=")
            if not mark or task not in tasks:
                if len(tasks) > 1:
                    raise ValueError(
                        f"--dataset_path {text}: with several tasks write TASK=PATH, TASK one of {', '.join(tasks)}"
                    )
                task, path = name, text
            if task == name:
                found["dataset_path"] = path
        for text in self.task_option:
            place, mark, value = text.partition("=")
            task, dot, option = place.partition(".")
            if not (mark and dot and task in tasks and option):
                raise ValueError(f"--task_option {text}: must be TASK.OPTION=VALUE with TASK one of {', '.join(tasks)}")
            if task == name:
                known: dict[str, Any] = {"true": True, "false": False}
                found[option] = known.get(value.lower(), int(value) if value.isdecimal() else value)
        return found

    def folder(self, tasks: Sequence[str]) -> Path:
        """--output_dir; by default named after tasks and budgets, beside the first policy."""
        if self.output_dir:
            return Path(self.output_dir)
        policy = Path(self.policy[0]) if self.policy else None
        parent = policy.resolve().parent if policy and policy.is_dir() else Path("runs")
        blocks = "_".join(budget.replace("/", "-") for budget in self.budgets())
        return parent / "_".join(["evaluation", "-".join(tasks), *([blocks] if blocks else [])])
