"""docs/reproduction.md: made of the results alone, verdicts included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.analyses.config import Analysis
from training.analyses.verdicts import FAILS, HOLDS, OPEN

MARKS = {outcome: f"**{outcome}**" for outcome in (HOLDS, FAILS, OPEN)}
SENTENCES = {outcome: f"**{outcome[0].upper()}{outcome[1:]}**" for outcome in MARKS}
INTRO = """# The paper's tables and figures, run again

Every table and figure of the paper as a command. This page is written by that command from the numbers beside it
(`docs/reproduction/results`); no verdict is typed by hand.

```
python training/reproduce.py --list            # names, what they are, how long they take
python training/reproduce.py cliff transfer    # some of them
python training/reproduce.py --all             # all of them
```

Results that are there with the same settings, data and code are not made again (`--overwrite` does), finished jobs and
trained agents in `runs/reproduce` are used again by whatever needs them, and a stopped run goes on where it was.

{model}

**How it is decided.** Intervals in brackets are 95 %: a bootstrap over test samples (the same for all methods of a
task) and, where there are several trainings or draws, over those too. A claim *holds* if the whole interval is on its
side, *does not hold* if the whole interval is on the other, and *cannot be told* otherwise. Claims in several parts
hold if all parts do. Where a verdict hangs on one task, it says what it would be without. Three trainings are few:
their intervals are rough. Nothing is corrected for the number of claims.

**7B.** The commands below take data sets from the Hub, or `--dataset_path TASK=PATH`. Agents are trained on a task's
training split, which TextVQA, GQA and ScienceQA have and POPE, for instance, has not; the model is then in float32.
"""
TINY = """**What this can tell.** The measurements below are of the embedded tiny LLaVA: 1.75 M parameters, 6 decoder
layers, 64 visual tokens. No benchmark of the paper and no 7B model was run. So the question is never whether a *number*
of the paper is met but whether its *claim* also holds here; where it does not, the model may be the reason, and where
it does, that is no proof for 7B. Six layers and 64 tokens leave progressive pruning little room, questions are
templates about synthetic scenes, and the agent does not see them (as in the paper)."""


def write_page(path: Path, analyses: Mapping[str, Analysis], records: Mapping[str, dict[str, Any]]) -> None:
    """The page of all results there are.

    Args:
        path: of the page; figures are in the folder of the same name beside it.
        records: files of results by analysis name.
    """
    chosen = [analyses[name] for name in analyses if name in records]
    models = {records[one.name]["settings"]["model"]["name"] for one in chosen}
    words = TINY if models == {"tiny"} else f"The measurements below are of {' and '.join(sorted(models))}."
    parts = [INTRO.replace("{model}", words), summary(chosen, records)]
    parts += [section(one, records[one.name], path.stem) for one in chosen]
    path.write_text("\n".join(parts))


def summary(chosen: list[Analysis], records: Mapping[str, dict[str, Any]]) -> str:
    """All claims with their verdicts."""
    lines = ["## All claims", "", "| where | claim | here |", "| --- | --- | --- |"]
    for one in chosen:
        for verdict in one.verdicts(records[one.name]["result"]):
            what = MARKS[verdict.outcome] + (f", {verdict.without}" if verdict.without else "")
            lines.append(f"| [{one.title.split(':')[0]}](#{anchor(one.title)}) | {verdict.claim} | {what} |")
    return "\n".join(lines) + "\n"


def anchor(title: str) -> str:
    """The name that GitHub gives a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")


def section(one: Analysis, record: Mapping[str, Any], folder: str) -> str:
    """One table or figure: what the paper says, what was done, figure, table, verdicts, commands."""
    result, where = record["result"], record["environment"]
    lines = [f"## {one.title}", "", f"**Paper.** {one.paper}", "", f"**Here.** {one.protocol}", ""]
    lines += [f"![{one.title}]({folder}/{one.name}.png)", "", one.table(result), ""]
    for verdict in one.verdicts(result):
        lines += [f"- {verdict.claim} {SENTENCES[verdict.outcome]}: {verdict.evidence}"]
    minutes = record["seconds"] / 60
    lines += [
        "",
        f"`python training/reproduce.py {one.name}`: {minutes:.1f} minutes of one core, agents included wherever "
        f"they were trained; {where['device']}, {where['date']}, torch {where['torch']}, transformers "
        f"{where['transformers']}.",
        "",
        f"7B: {seven(one)}",
        "",
    ]
    return "\n".join(lines)


def seven(one: Analysis) -> str:
    """The command for a 7B model."""
    if not one.command:
        return (
            "the synthetic clips are the tiny model's. Methods without training on the paper's sets: `python "
            "training/evaluate.py --model_name_or_path LanguageBind/Video-LLaVA-7B-hf --task msvd_qa msrvtt_qa "
            "activitynet_qa --dataset_path msvd_qa=DIR msrvtt_qa=DIR activitynet_qa=DIR --method fastv sparsevlm "
            "pyramiddrop --budget 256 194 --dtype bfloat16 --device cuda`."
        )
    return f"`python training/reproduce.py {one.name} {one.command}`"
