"""What the pruner supports, and what it would do with a given model.

    python -m toprl_models.check                                     # all families
    python -m toprl_models.check --model_name_or_path PATH_OR_HUB_ID # one model, from its config alone
    python -m toprl_models.check --method divprune+fastv             # which families a method applies to
    python -m toprl_models.check --model_name_or_path PATH_OR_HUB_ID --method my_file.py:MyMethod
    python -m toprl_models.check --markdown                          # docs/families.md

The features come from ``feature_matrix.json``, which the tests write (``make feature-matrix``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import transformers

from toprl_models.families import FAMILIES, Family, min_stage_of
from toprl_models.integrations.lmms_eval import skeleton
from toprl_models.pruner import attach
from toprl_models.registry import method_of
from toprl_models.schedule import PAPER_LAYERS, Schedule, stage_layers_for

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MATRIX_FILE = Path(__file__).with_name("feature_matrix.json")


def feature_matrix() -> dict[str, dict[str, str]]:
    """Read ``{feature: {model type: "pass" | "n/a: why" | "not run: why" | "FAIL"}}``, stored by the tests."""
    return json.loads(MATRIX_FILE.read_text())


def model_type_of(family: Family) -> str:
    """Return the family's key in the feature matrix: transformers' model type."""
    return str(getattr(transformers, family.model_class).config_class.model_type)


def stages_text(family: Family) -> str:
    """List the released sizes with their layers, and the paper's stages scaled to them."""
    parts = []
    for size, layers in family.depths.items():
        stages = ", ".join(map(str, stage_layers_for(layers, family.first_stage)))
        parts.append(f"{size}: {layers} layers, stages {stages}")
    return "; ".join(parts)


def describe(family: Family) -> str:
    """Describe a family: its visual tokens, stages, tested features and limits."""
    name, stages = model_type_of(family), stages_text(family)
    outcomes = {feature: row.get(name, "not tested") for feature, row in feature_matrix().items()}
    passed = ", ".join(feature for feature, outcome in outcomes.items() if outcome == "pass")
    return "\n".join(
        [
            f"{family.title} ({family.model_class})",
            f"  visual tokens: {family.visual_rule}",
            *([f"  stages: {stages}"] if stages else []),
            f"  tested: {passed or 'nothing'}",
            *(f"  {feature}: {outcome}" for feature, outcome in outcomes.items() if outcome != "pass"),
            *([f"  limits: {family.limits}"] if family.limits else []),
        ]
    )


def describe_method(name: str) -> str:
    """Describe a method: its paper, its stages and the families that it applies to."""
    method = method_of(name)
    stages = ", ".join(map(str, method.layers(PAPER_LAYERS)))
    lines = [f"{method.name}: {method.title}" + (f" ({method.paper})" if method.paper else "")]
    lines.append(f"  stages before layers {stages} of {PAPER_LAYERS}" + (", or any others" if method.staged else ""))
    if method.trained:
        lines.append("  needs a trained policy: the folder that training/ppo.py wrote")
    lines += [f"  {family.title}: {method.refuses(family) or 'applies'}" for family in FAMILIES.values()]
    return "\n".join(lines)


def describe_model(name_or_path: str, method_name: str | None = None) -> str:
    """Describe what the pruner would do with a model, from the model's config; no weights are loaded.

    Args:
        name_or_path: folder or Hub id of the model.
        method_name: a method whose stages and fit are described too.

    Raises:
        ValueError: ``method_name`` is nothing that ``method_of`` takes.
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
            *([_fit(method_name, family, config, first)] if method_name else []),
        ]
    )


def _fit(name: str, family: Family, config: PreTrainedConfig, first: int) -> str:
    """Tell in one line where the method prunes in the model of ``config``, or why it cannot."""
    method = method_of(name)
    layers = method.layers(config.get_text_config().num_hidden_layers, first)
    stages = Schedule(tuple((layer, 1.0) for layer in layers))
    reason = method.refuses(family)
    if not reason and not method.trained:  # a trained policy says itself which model it is for
        try:
            attach(skeleton(config), method.make(layers), schedule=stages).detach()
        except ValueError as error:
            reason = str(error)
    return f"  method {name}: " + (reason or f"stages before layers {', '.join(map(str, layers))}")


def families_markdown() -> str:
    """Make the table of families for README."""
    rows = ["| family | visual tokens | layers and stages that make sense |", "|---|---|---|"]
    for family in FAMILIES.values():
        limits = f" {family.limits}" if family.limits else ""
        rule = f"{family.visual_rule}{limits}".replace("<|", "`<\\|").replace("|>", "\\|>`")
        rows.append(f"| {family.title} | {rule} | {stages_text(family)} |")
    return "\n".join(rows)


def matrix_markdown() -> str:
    """Make the family x feature matrix for docs: a check mark where the tests pass, a numbered note elsewhere."""
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
    """Make the text of docs/families.md."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the command line asks for."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m toprl_models.check",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_name_or_path", help="folder or Hub id of one model")
    parser.add_argument("--markdown", action="store_true", help="print docs/families.md")
    parser.add_argument("--method", help="a name, my_file.py:MyMethod, or several joined by +")
    options = parser.parse_args(arguments)
    if options.model_name_or_path:
        print(describe_model(options.model_name_or_path, options.method))
    elif options.method:
        print(describe_method(options.method))
    elif options.markdown:
        print(page())
    else:
        print("\n\n".join(describe(family) for family in FAMILIES.values()))


if __name__ == "__main__":
    main()
