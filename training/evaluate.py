"""Compare pruning methods with the unpruned model, on any tasks, at the same average number of visual tokens.

    python training/evaluate.py --policy runs/ocr/policy --keep 8 4 2
    python training/evaluate.py --policy runs/ocr/policy --budget 32 14.5 --limit 256  # average tokens over all layers
    python training/evaluate.py --model_name_or_path llava-hf/llava-1.5-7b-hf --task textvqa gqa \\
        --method fastv pyramiddrop random --budget 192 64 --dtype bfloat16 --output_dir runs/table1
    python training/evaluate.py --method divprune+fastv my_file.py:MyMethod --budget 32  # composed; your class
    torchrun --nproc_per_node 8 training/evaluate.py ...                              # one shard per rank

Stopped, by whatever means, the same command goes on where it was. Writes samples.jsonl (every answer), results.json,
and the table as table.md and table.html. What the numbers mean: docs/evaluation.md.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import cli
from training.evaluation.config import EvaluateConfig
from training.evaluation.methods import Trained, load_policies, row_for
from training.evaluation.records import Store, write_whole
from training.evaluation.results import summarise
from training.evaluation.runner import Ranks, Runner
from training.evaluation.tables import console_tables, html_page, markdown
from training.fingerprint import code_facts, model_facts, processor_digest, samples_digest, versions
from training.tasks import Task, check_stages, device_of, load_model, make_task
from training.tasks.factory import SCENES
from training.trainer.launch import device_name

SCENES_TAKEN = 512  # scenes are endless: so many where --limit does not say


def task_names(config: EvaluateConfig, policies: Sequence[Trained]) -> list[str]:
    """--task, else what the policies were trained on.

    Raises:
        ValueError: neither says it.
    """
    names = config.task or list(dict.fromkeys(one.task for one in policies if one.task))
    if not names:
        raise ValueError("--task is needed: no policy says what it was trained on")
    return names


def make_tasks(config: EvaluateConfig, names: Sequence[str], policies: Sequence[Trained] = ()) -> dict[str, Task]:
    """The tasks, on the split that results are reported on unless --task_option says another.

    What --dataset_path and --task_option do not say is taken from the policy that was trained on the task.
    """
    known = [*inspect.signature(make_task).parameters][4:]
    found: dict[str, Task] = {}
    for name in names:
        options = config.task_arguments(name, names)
        trained = next((one for one in policies if one.task == name), None)
        if trained is not None:
            options = trained.task_options(options)
        split = options.pop("split", "test")
        for option in options:
            if option not in known:
                raise ValueError(f"--task_option {name}.{option}: no such option; known: split, {', '.join(known)}")
        size = config.limit or (SCENES_TAKEN if name in SCENES else sys.maxsize)
        found[name] = make_task(name, split, size, config.data_seed, **options)
    return found


def settings_of(config: EvaluateConfig, runner: Runner, model_name: str) -> dict[str, Any]:
    """Everything that a number depends on: a stopped evaluation goes on only under the same."""
    return {
        **model_facts(runner.model),
        "model": model_name,
        "revision": getattr(runner.model.config, "_commit_hash", None),
        "dtype": config.dtype,
        "quantization": config.quantization,
        "tasks": {name: _task_facts(task, runner.processor) for name, task in runner.tasks.items()},
        "methods": config.methods(),
        "policies": [one.digest for one in runner.policies],
        "keep": config.keep,
        "budget": config.budget,
        "stages": {name: runner.layers_of(name) for name in config.methods()},
        "code": code_facts(row.method for name in config.methods() if (row := row_for(name)).method),
        "seeds": config.seeds,
        "batch_size": runner.batch_size,
        **versions(),
    }


def _task_facts(task: Task, processor: Any) -> dict[str, Any]:
    """Read every sample once: what is unreadable shows before hours of work, and what has changed is noticed."""
    samples = (task[index] for index in range(len(task)))
    return {
        **task.describe(),
        "content": samples_digest(task, samples),
        "processor": processor_digest(processor, task, task[0]),
    }


def environment_of(runner: Runner, world: int) -> dict[str, Any]:
    device = runner.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {"device_name": name, "ranks": world, "python": platform.python_version(), "platform": platform.platform()}


def evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """Run what is not done yet and write all files; the content of results.json (None on ranks other than 0).

    Raises:
        ValueError: flags that do not fit each other, model or data, or differ from those of the folder's results.
        RuntimeError: another evaluation is at work in the folder.
    """
    policies = load_policies(config.policy)
    names = task_names(config, policies)
    ranks = Ranks()
    try:
        device = device_name(config.device)
        if device == "cuda" and ranks.world > 1:
            device = f"cuda:{ranks.local_rank}"
        model_name = config.model_name_or_path or (policies[0].model if policies else "tiny")
        model, processor = load_model(
            model_name,
            device,
            getattr(torch, config.dtype),
            config.attn_implementation or None,
            config.device_map or None,
            config.quantization or None,
        )
        if config.stages:
            check_stages("--stages", config.stages, model)
        tasks = make_tasks(config, names, policies)
        for one in policies:
            one.policy.to(device_of(model))
        batch_size = config.batch_size or (128 if model_name == "tiny" else 8)
        runner = Runner(config, model, processor, tasks, policies, batch_size)
        return _evaluate(config, runner, ranks, model_name)
    finally:
        ranks.close()


def _evaluate(config: EvaluateConfig, runner: Runner, ranks: Ranks, model_name: str) -> dict[str, Any] | None:
    folder = config.folder(list(runner.tasks))
    store, console = Store(folder, ranks.rank), Console()
    settings: dict[str, Any] = {}
    try:
        if ranks.rank == 0:
            runner.check_methods()
            runner.probe()
            if config.dry_run:
                print(*runner.plan(), sep="\n")
                return None
            settings = settings_of(config, runner, model_name)
            for line in store.open(settings, config.overwrite):
                console.print(line, highlight=False)
        ranks.wait()
        if config.dry_run:
            return None
        total = sum(len(runner.tasks[cell.task]) for cell in runner.all_cells())
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=ranks.rank > 0) as bar:
            shown = bar.add_task("", total=total)

            def advance(what: str, answers: int, old: bool) -> None:
                # the other ranks are taken to be as fast as this one
                bar.update(shown, description=what, advance=answers if old else answers * ranks.world)

            runner.run(store, ranks, advance)
            bar.update(shown, description="answered", completed=total)
        if ranks.rank:
            return None
        results = {
            "settings": settings,
            **summarise(store.merge(runner.all_cells()), runner),
            "environment": environment_of(runner, ranks.world),
            "config": asdict(config),
        }
        results = json.loads(json.dumps(results))  # as a reader of the file sees it
        write_whole(folder / "results.json", json.dumps(results, indent=1))
        write_whole(folder / "table.md", markdown(results))
        write_whole(folder / "table.html", html_page(results))
        return results
    finally:
        store.close()


def main(config: EvaluateConfig) -> None:
    results = evaluate(config)
    if results is not None:
        Console().print(*console_tables(results))
        print(f"written: {config.folder(list(results['tasks']))}/ (samples.jsonl, results.json, table.md, table.html)")


if __name__ == "__main__":
    cli.run(lambda arguments: main(cli.parse(EvaluateConfig, __doc__, arguments)))
