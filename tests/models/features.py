"""The family x feature matrix: which test is evidence for which feature, and where a feature does not apply.

``@feature(name)`` parametrises a test over the families (argument ``family``) and marks it as evidence; the matrix is
printed at the end of a run, and ``--write-features`` stores it for ``python -m toprl_models.check`` and README.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.models.tiny_families import FAMILY_NAMES, MORE_FAMILIES, tiny_family
from toprl_models import METHODS
from toprl_models.check import model_type_of
from toprl_models.families import FAMILIES

MATRIX_FILE = Path(__file__).resolve().parents[2] / "src/toprl_models/feature_matrix.json"

# the methods whose cells are stored for every family
MATRIX_METHODS = (
    "toprl",
    "fastv",
    "fastv_progressive",
    "pyramiddrop",
    "sparsevlm",
    "visionzip",
    "fastervlm",
    "divprune",
    "downsample",
    "oneshot",
    "random",
)
# the other methods run with it in the usual lane, with all families when asked for
SHELF_FAMILY = "llava"
IMAGE_METHODS = [name for name, method in METHODS.items() if "images" in method.inputs]

# in the order of the printed table; the tests of those of ``MORE_FAMILIES`` are left out unless asked for
ALL_FAMILIES = [*FAMILY_NAMES, *MORE_FAMILIES]
FEATURES = (
    # inputs
    "images",
    "videos",
    "left-padded batch with text-only rows",
    "right-padded forward",
    "several prompts packed into a row",
    "inputs_embeds that hold the features",
    "image-only prefix for many questions",
    # schedules
    "keep-all = unattached, bitwise",
    "compact = mask (Eqs. 6-7)",
    "stage before the first possible and the last layer",
    "drop-all and keep-one",
    "cache lengths as scheduled",
    # attention
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2, stand-in",
    "flash_attention_2, real",
    # caches
    "DynamicCache",
    "StaticCache",
    "quantised cache",
    "offloaded cache",
    "use_cache=False",
    "copied cache",
    # decoding
    "greedy",
    "sampling with a seed",
    "beam search",
    "num_return_sequences",
    "assisted decoding",
    "prompt lookup",
    "prefill in chunks",
    "second turn on the pruned cache",
    # outputs and training
    "logits_to_keep",
    "labels and loss",
    "answer in the forward pass",
    "output_hidden_states",
    "output_attentions",
    "gradient of the keep mask",
    "gradient checkpointing",
    "torch.compile of the decode step",
    "bfloat16",
    "reused vision features",
    # model handling
    "save_pretrained, deepcopy, pickle, to()",
    "PEFT",
    "accelerate hooks",
    "8-bit weights",
    # methods
    *(f"method {name}" for name in MATRIX_METHODS),
)

CLASSES = {model_type_of(family): getattr(transformers, family.model_class) for family in FAMILIES.values()}
# as the families' rows say
METHODS_NOT_APPLICABLE = {
    (name, model_type_of(family)): reason
    for name, method in METHODS.items()
    for family in FAMILIES.values()
    if (reason := method.refuses(family))
}

# what attach says of a class that a row does not tell
METHODS_NOT_APPLICABLE |= {
    ("downsample", "ovis2"): "the vision tower (Ovis2VisionModel) cannot interpolate its position embeddings",
    ("downsample", "gemma3"): "Gemma3MultiModalProjector pools a picture of one size alone",
    **{
        (name, family): f"the vision tower ({tower}) takes lists of patches ({argument}), of which this method does"
        " not know which become one token"
        for name in ("visionzip", "fastervlm", "downsample")
        for family, tower, argument in (
            ("lfm2_vl", "Siglip2VisionModel", "spatial_shapes"),
            ("gemma4", "Gemma4VisionModel", "pixel_position_ids"),
            ("minicpmv4_6", "MiniCPMV4_6VisionModel", "target_sizes"),
        )
    },
    **{
        (name, "llama4"): "the vision tower (Llama4VisionModel) has a class token, and nothing in the config of "
        "Llama4ForConditionalGeneration says where it goes"
        for name in ("visionzip", "fastervlm", "downsample")
    },
}

HYBRIDS = ("qwen3_5", "qwen3_5_moe", "lfm2_vl", "minicpmv4_6")
# why a feature does not apply, by (feature, family)
NOT_APPLICABLE: dict[tuple[str, str], str] = {
    **{("videos", name): "the model takes no videos" for name in ALL_FAMILIES if tiny_family(name).video is None},
    **{
        ("flex_attention", name): "transformers refuses flex attention for this model"
        for name in (
            "qwen2_5_vl",
            "qwen3_vl",
            "qwen2_vl",
            "qwen3_5",
            "qwen3_5_moe",
            "glm4v",
            "glm46v",
            "minicpmv4_6",
        )
    },
    **{
        (name, family): "layers that keep a state have no mask mode"
        for name in ("compact = mask (Eqs. 6-7)", "gradient of the keep mask")
        for family in HYBRIDS
    },
    **{
        ("several prompts packed into a row", family): "layers that keep a state run on from one prompt of a row into "
        "the next, unpruned too: refused"
        for family in HYBRIDS
    },
    **{
        (name, family): "transformers refuses assisted generation for models that keep a state"
        for name in ("assisted decoding", "prompt lookup")
        for family in HYBRIDS
    },
    **{
        ("quantised cache", name): "transformers' quantised caches hold full attention alone"
        for name in (*HYBRIDS, "gemma3", "gemma4", "llama4")
    },
    **{
        (name, "llama4"): "transformers repeats no images for several answers of this model and raises, unpruned too"
        for name in ("num_return_sequences", "beam search")
    },
    **{
        (
            "prefill in chunks",
            name,
        ): "transformers cannot cut vision features of this model and raises, unpruned too"
        for name in ("llama4", "ovis2")
    },
    ("logits_to_keep", "minicpmv4_6"): "transformers' model has no such argument",
    ("torch.compile of the decode step", "llama4"): "transformers compiles no step of this model, unpruned too",
    **{
        (name, "paligemma"): "tokens of a prompt see all tokens of its pass, drafts too, so that answers differ, "
        "unpruned too"
        for name in ("assisted decoding", "prompt lookup")
    },
    **{
        (
            name,
            "paligemma",
        ): "tokens of a prompt see all of it, and a part that comes first sees itself alone, unpruned too"
        for name in ("prefill in chunks", "image-only prefix for many questions")
    },
    **{
        (f"flash_attention_2, {which}", "llama4"): "transformers refuses flash attention for this model"
        for which in ("stand-in", "real")
    },
    **{
        (f"flash_attention_2, {which}", name): "with flash attention transformers' model lets no image token see later "
        "ones, unpruned too"
        for name in ("gemma3", "paligemma")
        for which in ("stand-in", "real")
    },
    **{(f"method {name}", family): reason for (name, family), reason in METHODS_NOT_APPLICABLE.items()},
}


# what reads the tower is refused where VisionZip is
TOWER_METHODS = ("vispruner", "holov", "prumerge_plus", "hiprune", "vscan")
METHODS_NOT_APPLICABLE |= {
    (name, family): reason
    for (other, family), reason in METHODS_NOT_APPLICABLE.items()
    for name in TOWER_METHODS
    if other == "visionzip"
}


def case(family: str, *values: Any, marks: Sequence[Any] = ()) -> Any:
    """Make the parameters ``values`` and ``family`` of a test that is left out of the usual run for most families."""
    return pytest.param(*values, family, marks=[*marks, *([pytest.mark.exhaustive] if family in MORE_FAMILIES else [])])


def feature(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a test with an argument ``family``: it shows that ``name`` works for that family."""
    assert name in FEATURES, f"{name!r} is not in FEATURES"
    families = [case(family) for family in ALL_FAMILIES if (name, family) not in NOT_APPLICABLE]

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        return pytest.mark.feature(name)(pytest.mark.parametrize("family", families)(function))

    return mark


def unusual(*numbers: int, every: int) -> list[Any]:
    """Mark a combination, by the numbers of its values, as left out of the usual run unless it is an ``every``-th.

    Any two values of different arguments still meet there, if the other arguments have ``every`` values or more.
    """
    return [pytest.mark.exhaustive] if sum(numbers) % every else []


def crossed(name: str, arguments: str, *values: Sequence[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator as ``feature``, for two more ``arguments`` of two values each; the usual run has half of the cases."""
    families = [family for family in ALL_FAMILIES if (name, family) not in NOT_APPLICABLE]
    cells = [
        case(
            families[one],
            *(values[i][number] for i, number in enumerate(numbers)),
            marks=unusual(*numbers, one, every=2),
        )
        for *numbers, one in itertools.product(*(range(len(some)) for some in values), range(len(families)))
    ]

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        return pytest.mark.feature(name)(pytest.mark.parametrize((*arguments.split(), "family"), cells)(function))

    return mark


def each_method(
    *names: str, families: Sequence[str] = ALL_FAMILIES, every: int = 1
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a test with arguments ``name`` and ``family``: evidence for methods, all or ``names``, by family.

    The usual run has each method with ``every``-th family, and each family with ``every``-th method; the methods whose
    cells are not stored with ``SHELF_FAMILY`` alone.
    """

    def marks(name: str, family: str, number: int) -> list[Any]:
        if name in MATRIX_METHODS:
            return [pytest.mark.feature(f"method {name}"), *unusual(number, every=every)]
        return [] if family == SHELF_FAMILY or family in MORE_FAMILIES else [pytest.mark.exhaustive]

    cells = [
        case(family, name, marks=marks(name, family, i + j))
        for i, name in enumerate(names or IMAGE_METHODS)
        for j, family in enumerate(families)
        if (name, family) not in METHODS_NOT_APPLICABLE
    ]
    return pytest.mark.parametrize(("name", "family"), cells)


class Matrix:
    """Outcomes as they come in, from this process or from xdist's workers."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], str] = {}
        self.is_outdated = False

    def add(self, name: str, family: str, outcome: str, reason: str = "") -> None:
        """One test's outcome; the worst of a cell's tests counts."""
        value = {"passed": "pass", "failed": "FAIL", "skipped": f"not run: {reason}"}[outcome]
        rank = ("pass", "not run", "FAIL")
        known = self.outcomes.get((name, family), "pass")
        worst = max(known, value, key=lambda one: rank.index(one.split(":")[0]))
        self.outcomes[name, family] = worst

    def table(self) -> dict[str, dict[str, str]]:
        """{feature: {family: "pass" | "FAIL" | "not run: why" | "n/a: why"}}; only what was seen or does not apply."""
        table: dict[str, dict[str, str]] = {}
        for name in FEATURES:
            for family in ALL_FAMILIES:
                if (name, family) in NOT_APPLICABLE:
                    table.setdefault(name, {})[family] = f"n/a: {NOT_APPLICABLE[name, family]}"
                elif (name, family) in self.outcomes:
                    table.setdefault(name, {})[family] = self.outcomes[name, family]
        return table

    def complete(self) -> list[str]:
        """Name the families of which this run has seen every feature."""
        table, seen = self.table(), {family for _, family in self.outcomes}
        return [name for name in ALL_FAMILIES if name in seen and all(name in table.get(one, {}) for one in FEATURES)]

    def merged(self) -> dict[str, dict[str, str]]:
        """Put the columns of the complete families into the stored table."""
        table, stored, new = self.table(), self.stored(), self.complete()
        return {
            name: {
                family: row[family]
                for family in ALL_FAMILIES
                if family in (row := table[name] if family in new else stored.get(name, {}))
            }
            for name in FEATURES
        }

    def lines(self) -> list[str]:
        """The table as text, then the reasons."""
        seen = [family for family in ALL_FAMILIES if any(family == other for _, other in self.outcomes)]
        table = {name: row for name, row in self.table().items() if any((name, f) in self.outcomes for f in row)}
        if not table:
            return []
        width = max(map(len, table))
        lines = [" " * width + "  " + "  ".join(seen)]
        reasons: dict[str, None] = {}
        for name, row in table.items():
            cells = []
            for family in seen:
                word, _, reason = row.get(family, "").partition(": ")
                cells.append((word or "-").ljust(len(family)))
                if reason:
                    reasons[f"{name}, {word}: {reason}"] = None
            lines.append(f"{name.ljust(width)}  {'  '.join(cells)}".rstrip())
        return [*lines, *reasons]

    def stored(self) -> dict[str, dict[str, str]]:
        return json.loads(MATRIX_FILE.read_text()) if MATRIX_FILE.exists() else {}

    def store(self) -> None:
        """Store the columns of the complete families; raise ValueError where there is none, or a failure."""
        if not self.complete() or "FAIL" in self.outcomes.values():
            raise ValueError("this run has failures, or gaps for every family, and is not stored: make feature-matrix")
        MATRIX_FILE.write_text(json.dumps(self.merged(), indent=1, ensure_ascii=False) + "\n")
