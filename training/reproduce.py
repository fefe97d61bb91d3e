"""The paper's tables and figures: run, drawn and judged.

    python training/reproduce.py --list
    python training/reproduce.py cliff sensitivity
    python training/reproduce.py --all                       # two processes; minutes: see --list
    python training/reproduce.py main --model_name_or_path llava-hf/llava-1.5-7b-hf --task pope gqa --device cuda \\
        --dtype bfloat16 --batch_size 8 --budget 192 64 --actor_size 256 --output_dir runs/reproduction-7b

Writes results/NAME.json and NAME.png into --output_dir, and the page of all results beside it. What is there with the
same settings is not made again; stopped, the same command goes on where it was.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sys
from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import cli
from training.analyses.config import Analysis, ReproduceConfig
from training.analyses.lab import Lab
from training.analyses.page import write_page
from training.analyses.plots import save, styled
from training.analyses.registry import ANALYSES
from training.evaluation.records import write_whole
from training.fingerprint import differences, samples_digest
from training.tasks import make_task
from training.tasks.benchmarks import BENCHMARKS


def compact(value: Any) -> str:
    """JSON with a line per key, and lists of numbers on one line."""
    text = json.dumps(value, indent=1)
    return re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda found: "[" + re.sub(r",\s+", ", ", found[1]) + "]", text) + "\n"


def environment(device: str) -> dict[str, Any]:
    """What a number means nothing without."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }


def contents_of(config: ReproduceConfig) -> dict[str, str]:
    """Digest the samples that analyses and trainings take from data sets; scenes follow from code and seed."""
    found = {}
    for name in dict.fromkeys([*config.task, *config.ablation_task]):
        splits = BENCHMARKS[name].splits if name in BENCHMARKS else ()
        takes = [("test", config.size, 0), *(("train", config.train_size, seed) for seed in config.seeds)]
        for split, size, seed in takes:
            if split in splits:
                task = make_task(name, split, size, seed, config.path_of(name))
                found[f"{name}/{split}/{seed}"] = samples_digest(task, (task[i] for i in range(len(task))))
    return found


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Results that are there, by name."""
    files = {name: folder / "results" / f"{name}.json" for name in ANALYSES}
    return {name: json.loads(path.read_text()) for name, path in files.items() if path.is_file()}


def reproduce(analysis: Analysis, config: ReproduceConfig, lab: Lab) -> bool:
    """Compute and store an analysis unless its results are there; whether it was computed."""
    path = Path(config.output_dir) / "results" / f"{analysis.name}.json"
    settings = json.loads(json.dumps({**analysis.settings(config), "made_with": lab.made_with}))  # as in the file
    if path.is_file() and not config.overwrite:
        changed = differences(json.loads(path.read_text())["settings"], settings)
        if not changed:
            print(f"{analysis.name}: {path} is there already; --overwrite makes it again")
            return False
        print(f"{analysis.name}: again, since settings changed ({'; '.join(changed)})")
    print(f"{analysis.name}: {analysis.title}", flush=True)
    lab.seconds = 0.0
    result = analysis.run(config, lab)
    record = {"settings": settings, "environment": environment(config.device), "seconds": round(lab.seconds, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, compact({**record, "result": result}))
    return True


def publish(config: ReproduceConfig, drawn: Collection[str] = tuple(ANALYSES)) -> Path:
    """Draw the figures ``drawn`` and write the page, from what is on the disk; its path.

    Raises:
        FileNotFoundError: there are no results.
    """
    folder = Path(config.output_dir)
    records = read(folder)
    if not records:
        raise FileNotFoundError(f"--output_dir {folder} holds no results/*.json; name an analysis to run")
    for name in drawn:
        if name in records:
            with styled():
                save(ANALYSES[name].figure(records[name]["result"]), folder / f"{name}.png")
    page = folder.with_suffix(".md")
    write_page(page, ANALYSES, records)
    return page


def overview() -> str:
    """--list."""
    lines = [f"{'name':<12} {'minutes':>7}  what (minutes: in this order, two idle CPU cores, default settings)"]
    lines += [f"{one.name:<12} {one.minutes:>7g}  {one.title}" for one in ANALYSES.values()]
    total = sum(one.minutes for one in ANALYSES.values())
    return "\n".join([*lines, f"{'--all':<12} {total:>7g}  agents are trained where they are first needed"])


def parse(arguments: list[str]) -> tuple[ReproduceConfig, Namespace]:
    """Flags, and what to run.

    Raises:
        ValueError: an unknown name, or nothing to do.
    """
    parser = cli.parser_of(ReproduceConfig, __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ANALYSES)}")
    parser.add_argument("--all", action="store_true", help="every analysis")
    parser.add_argument("--list", action="store_true", help="print names and expected minutes")
    parser.add_argument("--page", action="store_true", help="only draw and write again what the results say")
    config, chosen = parser.parse_args_into_dataclasses(arguments)
    unknown = [name for name in chosen.names if name not in ANALYSES]
    if unknown:
        raise ValueError(f"{' '.join(unknown)}: unknown; known: {', '.join(ANALYSES)}")
    if not (chosen.names or chosen.all or chosen.list or chosen.page):
        raise ValueError(f"nothing to do: give names ({', '.join(ANALYSES)}), --all or --list")
    return config, chosen


def main(arguments: list[str]) -> None:
    config, chosen = parse(arguments)
    if chosen.list:
        print(overview())
        return
    with Lab(Path(config.work_dir), config.workers, contents_of(config)) as lab:
        for name in ANALYSES if chosen.all else chosen.names:
            if reproduce(ANALYSES[name], config, lab):
                publish(config, [name])
    print(f"page: {publish(config)}")


if __name__ == "__main__":
    cli.run(main)
