"""Compare a trained policy with the unpruned model and with baselines at the same schedule.

    python training/evaluate.py --policy runs/ppo/policy --keep 8 4 2
    python training/evaluate.py --policy runs/ocr_seed0/policy runs/ocr_seed1/policy --keep 8 4 2 --size 1024
    python training/evaluate.py --policy runs/ppo/policy --budget 14.5        # average tokens over all layers

Every method prunes before the layers that the policy was trained for and keeps the same number of tokens; the average
over all layers is counted from what was really kept. ``untrained`` is the same actor with fresh weights (several
inits): an agent that does not beat it has learned nothing. ``argmax`` keeps what the actor wants, whatever the number.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toprl_models import FastV, Policy, PyramidDrop, RandomPolicy, Schedule, TopRLPolicy, attach
from toprl_models.policy import model_signature
from training.rollout import ArgmaxPolicy
from training.tasks import Sample, answer, encode, load_model, make_task


@dataclass
class EvaluateConfig:
    """Flags of the script."""

    policy: list[str] = field(metadata={"help": "policy folders or Hub ids; several are averaged as seeds"})
    keep: list[int] = field(default_factory=list, metadata={"help": "tokens kept by each stage"})
    budget: float = field(default=0.0, metadata={"help": "instead of --keep: average visual tokens over all layers"})
    task: str = field(default="", metadata={"help": "empty takes the task that the policy was trained on"})
    size: int = field(default=512, metadata={"help": "test samples"})
    seed: int = field(default=0, metadata={"help": "seed of the test scenes"})
    controls: int = field(default=5, metadata={"help": "untrained actors"})
    random_seeds: int = field(default=3, metadata={"help": "runs of random pruning"})
    batch_size: int = field(default=128, metadata={"help": "samples per forward pass"})
    device: str = field(default="", metadata={"help": "cpu, cuda, ...; empty picks CUDA where there is one"})
    output: str = field(
        default="", metadata={"help": "JSON file; empty writes evaluation.json beside the first policy"}
    )


@dataclass
class MethodResult:
    """One method on one task: mean score, average tokens over layers, L_t / L per stage, all answers."""

    accuracy: float
    average_tokens: float
    retained: list[float]
    answers: list[str]


def run_method(
    model: Any,
    processor: Any,
    task: Any,
    samples: list[Sample],
    policy: Policy | None,
    schedule: Schedule,
    batch_size: int,
) -> MethodResult:
    """Answer all samples with ``policy`` attached (None: unpruned)."""
    num_layers = model.config.get_text_config().num_hidden_layers
    edges = (0, *schedule.layers, num_layers)
    layers = torch.tensor([b - a for a, b in pairwise(edges)], dtype=torch.float64)
    scores, answers, tokens, retained = [], [], [], []
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        inputs = encode(processor, task, batch, model.device)
        if policy is None:
            text, score = answer(model, processor, task, batch, inputs)
            num_visual = (inputs["input_ids"] == model.config.image_token_id).sum(1, keepdim=True).cpu()
            counts = num_visual.expand(-1, len(layers)).double()
        else:
            with attach(model, policy, schedule=schedule) as pruner:
                text, score = answer(model, processor, task, batch, inputs)
                stages = [pruner.trace[0].num_visual, *(stage.counts for stage in pruner.trace)]
            counts = torch.tensor(stages, dtype=torch.float64).T
        scores.append(score)
        answers += text
        tokens.append(counts @ layers / num_layers)
        retained.append(counts[:, 1:] / counts[:, :1])
    return MethodResult(
        accuracy=torch.cat(scores).mean().item(),
        average_tokens=torch.cat(tokens).mean().item(),
        retained=torch.cat(retained).mean(0).tolist(),
        answers=answers,
    )


def row_of(method: str, results: list[MethodResult]) -> dict[str, Any]:
    """A row of results.json: accuracies per seed, mean average tokens."""
    tokens = sum(r.average_tokens for r in results) / len(results)
    return {"method": method, "accuracy": [r.accuracy for r in results], "average_tokens": tokens}


def make_schedule(config: EvaluateConfig, layers: tuple[int, ...], num_visual: int, num_layers: int) -> Schedule:
    """The schedule of --keep or --budget.

    Raises:
        ValueError: neither or both given, or a keep per stage is missing.
    """
    if bool(config.keep) == bool(config.budget):
        raise ValueError("give either --keep (tokens per stage) or --budget (average tokens over all layers)")
    if config.budget:
        return Schedule.for_budget(config.budget, layers, num_visual=num_visual, num_layers=num_layers)
    if len(config.keep) != len(layers):
        raise ValueError(
            f"--keep {config.keep}: the policy prunes at layers {layers}, so {len(layers)} numbers are needed"
        )
    return Schedule(tuple(zip(layers, config.keep, strict=True)))


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """All methods on one task; the result is what the script writes."""
    policies = [TopRLPolicy.from_pretrained(folder) for folder in config.policy]
    first = policies[0]
    if len({p.stage_layers for p in policies}) > 1:
        raise ValueError(f"--policy: different stage layers {[p.stage_layers for p in policies]}; evaluate them apart")
    name = config.task or first.metadata.get("task")
    if not name:
        raise ValueError("--task is needed: the policy does not say what it was trained on")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = load_model(first.metadata.get("model", "tiny"), device)
    policies = [p.to(device).eval() for p in policies]
    task = make_task(name, "test", config.size, config.seed)
    samples = [task[i] for i in range(len(task))]
    text = model.config.get_text_config()
    num_visual = model.config.image_seq_length
    schedule = make_schedule(config, first.stage_layers, num_visual, text.num_hidden_layers)

    def run(policy: Policy | None) -> MethodResult:
        return run_method(model, processor, task, samples, policy, schedule, config.batch_size)

    def untrained(seed: int) -> TopRLPolicy:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(10_000 + seed)
            fresh = TopRLPolicy(
                first.hidden_size, list(first.stage_layers), first.fc1.out_features, model_signature(model)
            )
        return fresh.to(device)

    argmax = [run(ArgmaxPolicy(p)) for p in policies]
    rows = [
        row_of("full", [run(None)]),
        row_of("toprl", [run(p) for p in policies]),
        row_of("fastv", [run(FastV())]),
        row_of("pyramiddrop", [run(PyramidDrop())]),
        row_of("random", [run(RandomPolicy(seed)) for seed in range(config.random_seeds)]),
        row_of("untrained", [run(untrained(seed)) for seed in range(config.controls)]),
    ]
    config_macs = schedule.macs(num_visual, text)
    full_macs = Schedule(((1, 1.0),)).macs(num_visual, text)
    return {
        "task": name,
        "n": len(samples),
        "schedule": {
            "layers": list(schedule.layers),
            "keep": list(schedule.counts(num_visual)),
            "num_visual": num_visual,
            "num_layers": text.num_hidden_layers,
            "average_tokens": schedule.average_tokens(num_visual, text.num_hidden_layers),
            "macs_ratio": config_macs / full_macs,
        },
        "rows": rows,
        "argmax": {
            "accuracy": [r.accuracy for r in argmax],
            "kept": [sum(r.retained) / len(r.retained) for r in argmax],
            "retained": [r.retained for r in argmax],
        },
        "config": asdict(config),
    }


def print_table(result: dict[str, Any]) -> None:
    """The result as a table on the console."""
    from rich.console import Console
    from rich.table import Table

    schedule = result["schedule"]
    table = Table(
        title=f"{result['task']}, n = {result['n']}: before layers {schedule['layers']} "
        f"keep {schedule['keep']} of {schedule['num_visual']} visual tokens"
    )
    for column in ("method", "accuracy", "of full", "average tokens", "runs"):
        table.add_column(column, justify="left" if column == "method" else "right")
    full = result["rows"][0]["accuracy"][0]
    for row in result["rows"]:
        mean = sum(row["accuracy"]) / len(row["accuracy"])
        share = f"{mean / full:.1%}" if full else "-"
        table.add_row(row["method"], f"{mean:.3f}", share, f"{row['average_tokens']:.2f}", str(len(row["accuracy"])))
    kept, accuracy = result["argmax"]["kept"], result["argmax"]["accuracy"]
    table.caption = (
        f"arg-max agent: accuracy {sum(accuracy) / len(accuracy):.3f}, mean keep {sum(kept) / len(kept):.3f}"
    )
    Console().print(table)


def main(config: EvaluateConfig) -> None:
    result = evaluate(config)
    path = Path(config.output) if config.output else Path(config.policy[0]).parent / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    print_table(result)
    print(f"written: {path}")


if __name__ == "__main__":
    main(HfArgumentParser(EvaluateConfig, description=__doc__.split("\n")[0]).parse_args_into_dataclasses()[0])
