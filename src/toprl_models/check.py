"""What the pruner supports, and what it would do with a given model.

    python -m toprl_models.check                                     # all families
    python -m toprl_models.check --model_name_or_path PATH_OR_HUB_ID # one model, from its config alone
    python -m toprl_models.check --markdown                          # docs/families.md

The features come from ``feature_matrix.json``, which the tests write (``make feature-matrix``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from toprl_models.families import FAMILIES, Family, min_stage_of
from toprl_models.schedule import stage_layers_for

MATRIX_FILE = Path(__file__).with_name("feature_matrix.json")
# decoder layers of released checkpoints: facts of their configs
DEPTHS = {
    "LLaVA-1.5": {"7B": 32, "13B": 40},
    "LLaVA-NeXT": {"7B": 32, "13B": 40, "34B": 60},
    "Video-LLaVA": {"7B": 32},
    "LLaVA-OneVision": {"0.5B": 24, "7B": 28, "72B": 80},
    "Qwen2.5-VL": {"3B": 36, "7B": 28, "32B": 64, "72B": 80},
    "InternVL3": {"1B": 24, "2B": 28, "8B": 28, "14B": 48, "38B": 64, "78B": 80},
    "Qwen3-VL": {"2B": 28, "4B": 36, "8B": 36, "32B": 64},
}
FIRST_STAGE = {"Qwen3-VL": 3}  # released models: three deepstack layers


def feature_matrix() -> dict[str, dict[str, str]]:
    """``{feature: {tiny family name: "pass" | "n/a: why" | "not run: why" | "FAIL"}}`` as the tests stored it.

    Raises:
        FileNotFoundError: the file is missing from the installation.
    """
    return json.loads(MATRIX_FILE.read_text())


def model_type_of(family: Family) -> str:
    """The family's key in the feature matrix: transformers' model type."""
    config = getattr(transformers, family.model_class).config_class
    return str(config.model_type)


def features_of(family: Family) -> tuple[list[str], dict[str, str]]:
    """Tested features, and those that are not, each with the reason."""
    passed, others = [], {}
    name = model_type_of(family)
    for feature, row in feature_matrix().items():
        outcome = row.get(name, "not tested")
        if outcome == "pass":
            passed.append(feature)
        else:
            others[feature] = outcome
    return passed, others


def stages_text(title: str) -> str:
    """Per released size: layers, and the paper's stages scaled to them."""
    first = FIRST_STAGE.get(title, 1)
    parts = []
    for size, layers in DEPTHS.get(title, {}).items():
        stages = ", ".join(map(str, stage_layers_for(layers, first)))
        parts.append(f"{size}: {layers} layers, stages {stages}")
    return "; ".join(parts)


def describe(family: Family) -> str:
    """The text block of one family."""
    lines = [f"{family.title} ({family.model_class})", f"  visual tokens: {family.visual_rule}"]
    if stages := stages_text(family.title):
        lines.append(f"  stages: {stages}")
    passed, others = features_of(family)
    lines.append(f"  tested: {', '.join(passed) or 'nothing'}")
    lines += [f"  {feature}: {why}" for feature, why in others.items()]
    if family.limits:
        lines.append(f"  limits: {family.limits}")
    return "\n".join(lines)


def describe_model(name_or_path: str) -> str:
    """What the pruner would do with a model, read from its config; no weights are loaded.

    Raises:
        TypeError: the config belongs to no supported class; the message lists the supported ones.
        OSError: transformers finds no config there.
    """
    config = transformers.AutoConfig.from_pretrained(name_or_path)
    by_type = {model_type_of(family): family for family in FAMILIES.values()}
    if config.model_type not in by_type:
        raise TypeError(
            f"model_name_or_path={name_or_path} has model_type={config.model_type!r}, which is not supported; "
            f"supported: {', '.join(sorted(by_type))}"
        )
    family = by_type[config.model_type]
    holder = argparse.Namespace(config=config)  # all that a family's functions read
    first = min_stage_of(holder, family)
    layers = config.get_text_config().num_hidden_layers
    ids = {name: getattr(config, name) for name in family.visual_ids if getattr(config, name, None) is not None}
    stages = stage_layers_for(layers, max(1, first))
    keeps = ", ".join(f"({layer}, {keep})" for layer, keep in zip(stages, (0.5, 0.25, 0.125), strict=True))
    return "\n".join(
        [
            f"{name_or_path}: {family.title} ({family.model_class})",
            f"  visual tokens: {family.visual_rule} Ids: {ids}",
            f"  decoder layers: {layers}; stages may lie before layers {first} to {layers - 1}",
            f"  a first schedule: Schedule(stages=({keeps}))",
            *([f"  limits: {family.limits}"] if family.limits else []),
        ]
    )


def families_markdown() -> str:
    """The table of families for README."""
    rows = ["| family | visual tokens | layers and stages that make sense |", "|---|---|---|"]
    for family in FAMILIES.values():
        limits = f" {family.limits}" if family.limits else ""
        rule = f"{family.visual_rule}{limits}".replace("<|", "`<\\|").replace("|>", "\\|>`")
        rows.append(f"| {family.title} | {rule} | {stages_text(family.title)} |")
    return "\n".join(rows)


def matrix_markdown() -> str:
    """The family x feature matrix for docs: a check mark where the tests pass, a numbered note elsewhere."""
    titles = {model_type_of(family): family.title for family in FAMILIES.values()}
    matrix = feature_matrix()
    names = [name for name in titles if any(name in row for row in matrix.values())]
    notes: dict[str, int] = {}
    rows = [f"| feature | {' | '.join(titles[name] for name in names)} |", "|---|" + ":-:|" * len(names)]
    for feature, row in matrix.items():
        cells = []
        for name in names:
            outcome = row.get(name, "not tested")
            cells.append("✓" if outcome == "pass" else f"({notes.setdefault(outcome, len(notes) + 1)})")
        rows.append(f"| {feature} | {' | '.join(cells)} |")
    rows.append("")
    rows += [f"({number}) {note}  " for note, number in notes.items()]
    return "\n".join(rows)


def page() -> str:
    """docs/families.md."""
    return "\n\n".join(
        [
            "# Families and features",
            "Written by `make feature-matrix` from the tests' own outcomes; do not edit by hand. All tests run on tiny "
            "random\nmodels of the real transformers classes, in float32 unless the row says otherwise, on a CPU.",
            families_markdown(),
            "## What is tested for which family",
            matrix_markdown().rstrip(),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> Any:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m toprl_models.check",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_name_or_path", help="folder or Hub id of one model")
    parser.add_argument("--markdown", action="store_true", help="print docs/families.md")
    options = parser.parse_args(arguments)
    if options.model_name_or_path:
        print(describe_model(options.model_name_or_path))
    elif options.markdown:
        print(page())
    else:
        print("\n\n".join(describe(family) for family in FAMILIES.values()))


if __name__ == "__main__":
    main()
