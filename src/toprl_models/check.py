"""What a model is made of, what pruning can do with it, and whether it does so exactly.

    python -m toprl_models.check PATH_OR_HUB_ID                      # structure, then the pruned model against itself
    python -m toprl_models.check PATH_OR_HUB_ID --structure_only     # from its config alone; no weights are loaded
    python -m toprl_models.check PATH_OR_HUB_ID --method my_file.py:MyMethod
    python -m toprl_models.check --method divprune+fastv             # which families a method applies to
    python -m toprl_models.check                                     # the families with rows of their own
    python -m toprl_models.check --markdown                          # docs/families.md

What is tested of the families comes from ``feature_matrix.json``, what of all classes from ``classes.json``; the tests
write both (``make feature-matrix``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import Image

from toprl_models.command import parser_of
from toprl_models.families import FAMILIES, Family, family_of, min_stage_of, visual_token_ids
from toprl_models.integrations.lmms_eval import skeleton
from toprl_models.methods import FastV, RandomPolicy
from toprl_models.policy import Policy
from toprl_models.probe import blocked_stages, decoder_of, has_plain_positions, has_state, keyless_layers
from toprl_models.processors import encode, load_processor
from toprl_models.pruner import attach
from toprl_models.registry import layers_for, method_of
from toprl_models.schedule import PAPER_LAYERS, Schedule, stage_layers_for
from toprl_models.verify import verdict, verify

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MATRIX_FILE = Path(__file__).with_name("feature_matrix.json")
COLUMNS = 8  # of a table of families that a screen can hold
CLASSES_FILE = Path(__file__).with_name("classes.json")
EXACT = """\
A tiny random model of each class, in float32, three left-padded rows: one image, two images, none. *Exact* is: the
prompt and a greedy answer with everything kept are the unattached model's; compact mode gives the states that the
unattached decoder computes of the survivors alone, row by row, in the prompt and in the answer; mask mode gives the
same; caches are as short as scheduled; FastV's scores are the mean of the model's own eager attention weights;
`detach()` restores the model. A class with `+` is another configuration. The same checks run on your model with
`python -m toprl_models.check PATH_OR_HUB_ID`."""


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
    """Describe the structure of a model and what follows for pruning, from its config; no weights are loaded.

    Args:
        name_or_path: folder or Hub id of the model.
        method_name: a method whose stages and fit are described too.

    Raises:
        ValueError: ``method_name`` is nothing that ``method_of`` takes.
        TypeError: the model cannot be pruned; the message says why.
        OSError: transformers finds no config there.
    """
    config = transformers.AutoConfig.from_pretrained(name_or_path)
    if type(config) not in transformers.AutoModelForImageTextToText._model_mapping:
        raise TypeError(
            f"{name_or_path}: model_type={config.model_type!r} is no image-text-to-text model of transformers"
        )
    model = skeleton(config)
    family, name = family_of(model), type(model).__name__
    decoder = decoder_of(model)
    layers: Any = decoder.layers
    first, blocked = min_stage_of(model, family), blocked_stages(decoder)
    possible = [layer for layer in range(first, len(layers)) if layer not in blocked]
    stages = [layer for layer in stage_layers_for(len(layers), max(1, first)) if layer in possible] or possible[:1]
    keeps = ", ".join(f"({layer}, {keep})" for layer, keep in zip(stages, (0.5, 0.25, 0.125), strict=False))
    ids = ", ".join(f"{key} {number}" for key, number in visual_token_ids(model, family).items())
    known = json.loads(CLASSES_FILE.read_text()).get(name, {})
    return "\n".join(
        [
            f"{name_or_path}: {family.title} ({name})",
            f"  visual tokens: {family.visual_rule} Ids: {ids}",
            f"  decoder: {type(decoder).__name__}, {len(layers)} layers: {_kinds(decoder)}; "
            f"{'plain' if has_plain_positions(model) else 'M-RoPE'} positions",
            f"  stages may lie before layers {_ranges(possible)}",
            f"  a first schedule: Schedule(stages=({keeps}{',' if len(stages) == 1 else ''}))",
            *(f"  mode {mode}: {_attaches(model, RandomPolicy(), stages, mode)}" for mode in ("compact", "mask")),
            f"  attention scores: {_attaches(model, FastV(), [max(stages[-1], 1)], 'compact')}",
            *([f"  a tiny model of this class in the tests: {known['outcome']}"] if known else []),
            *([f"  limits: {family.limits}"] if family.limits else []),
            *([_fit(method_name, family, config)] if method_name else []),
        ]
    )


def _kinds(decoder: Any) -> str:
    """Count the kinds of layers."""
    named = getattr(decoder.config, "layer_types", None) or []
    kinds = list(named) if len(named) == len(decoder.layers) else ["attention"] * len(decoder.layers)
    for index in keyless_layers(decoder.layers):
        kinds[index] += " (keeps a state)" if has_state(decoder.layers[index]) else " (no attention)"
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())


def _ranges(layers: list[int]) -> str:
    """Write [0, 1, 2, 5] as "0 to 2, 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _attaches(model: PreTrainedModel, policy: Policy, stages: Sequence[int], mode: Any) -> str:
    """Tell whether a policy can be attached, or why not."""
    try:
        attach(model, policy, schedule=Schedule(tuple((layer, 1.0) for layer in stages)), mode=mode).detach()
    except ValueError as error:
        return f"no: {error}"
    return "yes"


def compare(name_or_path: str) -> str:
    """Load a model and compare it, pruned, with itself, on a picture of its own: findings and verdict as text.

    Raises:
        TypeError, ValueError: the model cannot be pruned, or its processor makes no placeholder ids.
        ImportError: the processor needs a library that is missing.
    """
    processor = load_processor(name_or_path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(name_or_path, dtype="auto", device_map=None).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    ramp = np.linspace(0, 255, 336, dtype=np.uint8)
    picture = Image.fromarray(np.stack(np.broadcast_arrays(ramp[:, None], ramp, ramp[::-1]), -1))
    inputs = encode(processor, [picture], "What is in the picture? Answer in one sentence.", model)
    half = next(model.parameters()).dtype != torch.float32
    findings = verify(model, inputs, tolerance=3e-2 if half else 1e-3)
    lines = [f"  {found.outcome:8} {found.check}" + (f": {found.detail}" if found.detail else "") for found in findings]
    return "\n".join([*lines, f"  verdict: {verdict(findings)}"])


def _fit(name: str, family: Family, config: PreTrainedConfig) -> str:
    """Tell in one line where the method prunes in the model of ``config``, or why it cannot."""
    method = method_of(name)
    layers = layers_for(method, skeleton(config))
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
    """Make the family x feature matrix for docs: a check mark where the tests pass, a numbered note elsewhere.

    Families come in tables of ``COLUMNS`` each.
    """
    titles = {model_type_of(family): family.title for family in FAMILIES.values()}
    matrix = feature_matrix()
    names = [name for name in titles if any(name in row for row in matrix.values())]
    notes: dict[str, int] = {}
    rows = []
    for start in range(0, len(names), COLUMNS):
        part = names[start : start + COLUMNS]
        rows += [f"| feature | {' | '.join(titles[name] for name in part)} |", "|---|" + ":-:|" * len(part)]
        for feature, row in matrix.items():
            cells = []
            for name in part:
                outcome = row.get(name, "not tested")
                cells.append("✓" if outcome == "pass" else f"({notes.setdefault(outcome, len(notes) + 1)})")
            rows.append(f"| {feature} | {' | '.join(cells)} |")
        rows.append("")
    rows += [f"({number}) {note}  " for note, number in notes.items()]
    return "\n".join(rows)


def classes_markdown() -> str:
    """Make the table of all image-text classes for docs, with the reasons of limits and refusals as numbered notes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as names

    classes: dict[str, dict[str, str]] = json.loads(CLASSES_FILE.read_text())
    counts = Counter(classes[name]["outcome"] for name in names.values())
    notes: dict[str, int] = {}
    rows = ["| class | outcome |", "|---|---|"]
    for name, found in classes.items():
        reasons = [reason if check == "why" else f"{check}: {reason}" for check, reason in found.items()][1:]
        marks = "".join(f" ({notes.setdefault(reason, len(notes) + 1)})" for reason in reasons)
        rows.append(f"| {name.replace('ForConditionalGeneration', '')} | {found['outcome']}{marks} |")
    counted = ", ".join(f"{counts[kind]} {kind}" for kind in ("exact", "exact with limits", "refused", "not a case"))
    size = f"{len(names)} model types of transformers, {len(set(names.values()))} classes."
    return "\n".join(
        [
            f"{size} By model type: {counted}.\n",
            *rows,
            "",
            *(f"({number}) {note.replace('|', chr(92) + '|')}  " for note, number in notes.items()),
        ]
    )


def page() -> str:
    """Make the text of docs/families.md."""
    return "\n\n".join(
        [
            "# Families and features",
            "Written by `make feature-matrix` from the tests' own outcomes; do not edit by hand. All tests run on tiny "
            "random\nmodels of the real transformers classes, in float32 unless the row says otherwise, on a CPU.",
            families_markdown(),
            "## Every image-text class of transformers",
            EXACT,
            classes_markdown(),
            "## What is tested for which family",
            matrix_markdown().rstrip(),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the command line asks for."""
    parser = parser_of("check", __doc__)
    parser.add_argument("model", nargs="?", help="folder or Hub id of one model")
    parser.add_argument("--structure_only", action="store_true", help="load no weights and compare nothing")
    parser.add_argument("--markdown", action="store_true", help="print docs/families.md")
    parser.add_argument("--method", help="a name, my_file.py:MyMethod, or several joined by +")
    options = parser.parse_args(arguments)
    if options.model:
        print(describe_model(options.model, options.method))
        if not options.structure_only:
            print(compare(options.model))
    elif options.method:
        print(describe_method(options.method))
    elif options.markdown:
        print(page())
    else:
        print("\n\n".join(describe(family) for family in FAMILIES.values()))


if __name__ == "__main__":
    main()
