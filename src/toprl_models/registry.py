"""Pruning methods by name, and the schedule that gives each of them the same budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from toprl_kernels import flops
from toprl_models.methods import (
    DivPrune,
    Downsample,
    FasterVLM,
    FastV,
    FastVProgressive,
    OneShot,
    PyramidDrop,
    RandomPolicy,
    SparseVLM,
    VisionZip,
)
from toprl_models.methods.toprl import TopRLPolicy
from toprl_models.policy import Policy
from toprl_models.schedule import PAPER_LAYERS, PAPER_STAGES, Schedule, stage_layers_for

# Visual tokens of LLaVA-1.5, on which the authors state their settings
PAPER_TOKENS = 576
BEFORE_LLM = (0,)


@dataclass(frozen=True)
class Method:
    """One way to choose visual tokens.

    Attributes:
        name: as in tables' files and on command lines.
        title: for people.
        paper: where it is from.
        policy: makes the policy; ``TopRLPolicy`` and ``OneShot`` need arguments, the others have the authors' defaults.
        stages: the layers that prune in a decoder of 32 layers.
        staged: it may prune at any layers, any number of them.
        trained: it is made of a trained ``TopRLPolicy``.
        merges: behind a stage there are more tokens than the schedule says: ``Policy.counts`` tells how many.
        authors: tokens that the authors keep at each stage, of 576 in 32 layers, by what they call the budget.
    """

    name: str
    title: str
    paper: str
    policy: Callable[..., Policy]
    stages: tuple[int, ...] = PAPER_STAGES
    staged: bool = False
    trained: bool = False
    merges: bool = False
    authors: Mapping[float, tuple[int, ...]] = field(default_factory=dict)

    def layers(self, num_layers: int, first: int = 0) -> tuple[int, ...]:
        """The stages in a decoder of ``num_layers`` layers; those inside the model not before ``first``.

        Raises:
            ValueError: the decoder is too shallow.
        """
        return BEFORE_LLM if self.stages == BEFORE_LLM else stage_layers_for(num_layers, max(1, first), self.stages)


METHODS = {
    method.name: method
    for method in (
        Method("toprl", "TOP-RL", "TOP-RL", TopRLPolicy, staged=True, trained=True),
        Method("fastv", "FastV", "Chen et al., ECCV 2024", FastV, (2,)),
        Method("fastv_progressive", "FastV-P", "TOP-RL, Fig. 2", FastVProgressive, (8, 16, 24), staged=True),
        Method("pyramiddrop", "PyramidDrop", "Xing et al., CVPR 2025", PyramidDrop, staged=True),
        Method(
            "sparsevlm",
            "SparseVLM",
            "Zhang et al., ICML 2025",
            SparseVLM,
            (3, 7, 16),
            merges=True,
            authors={192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
        ),
        Method("visionzip", "VisionZip", "Yang et al., CVPR 2025", VisionZip, BEFORE_LLM),
        Method("fastervlm", "FasterVLM", "Zhang et al., arXiv 2412.01818", FasterVLM, BEFORE_LLM),
        Method("divprune", "DivPrune", "Alvar et al., CVPR 2025", DivPrune, BEFORE_LLM),
        Method("downsample", "Smaller image", "arXiv 2511.02650", Downsample, BEFORE_LLM),
        Method("oneshot", "TOP-RL, one stage", "TOP-RL, appendix C", OneShot, (2,), trained=True),
        Method("random", "Random patches", "control", RandomPolicy, staged=True),
    )
}


def method_of(name: str) -> Method:
    """The method called ``name``.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; known methods: {', '.join(METHODS)}")
    return METHODS[name]


def schedule_for(
    method: str,
    average_tokens: float,
    *,
    num_visual: int = PAPER_TOKENS,
    num_layers: int = PAPER_LAYERS,
    layers: tuple[int, ...] | None = None,
) -> Schedule:
    """The authors' setting of ``method`` for a budget, or where they state none the one that meets it.

    Methods of one stage keep k tokens so that the average over all layers is the budget (FastV: k = (B L - N K) /
    (L - K)); methods of several keep r, r^2, ... of the tokens. SparseVLM's authors count the layer that prunes as
    pruned: their 192, 128 and 64 are 206.5, 145.4 and 82.2 on average.

    Args:
        method: a name of ``METHODS``.
        average_tokens: wanted average of visual tokens over all decoder layers.
        num_visual: visual tokens of an image.
        num_layers: decoder layers.
        layers: the stages; by default those of the authors, scaled to the depth.

    Raises:
        ValueError: unknown method, or a budget that these stages cannot meet; the message states the floor.

    Example:
        >>> schedule_for("fastv", 192).counts(576)
        (166,)
        >>> schedule_for("sparsevlm", 192).stages
        ((3, 300), (7, 200), (16, 110))
    """
    info = method_of(method)
    chosen = info.layers(num_layers) if layers is None else tuple(layers)
    stated = (num_visual, num_layers, chosen) == (PAPER_TOKENS, PAPER_LAYERS, info.stages)
    if stated and average_tokens in info.authors:
        return Schedule(tuple(zip(chosen, info.authors[average_tokens], strict=True)))
    schedule = Schedule.for_budget(average_tokens, chosen, num_visual=num_visual, num_layers=num_layers)
    return _less_merged(info, schedule, average_tokens, num_visual, num_layers) if info.merges else schedule


def _less_merged(info: Method, schedule: Schedule, budget: float, num_visual: int, num_layers: int) -> Schedule:
    """As ``schedule``, with so many tokens fewer that those merged at the stages are within the budget."""
    policy = info.policy()
    low, high = 0.0, float(schedule.stages[0][1])
    for _ in range(40):  # counts are whole numbers: the share needs no more precision
        ratio = (low + high) / 2
        tried = Schedule(tuple((layer, ratio ** (i + 1)) for i, layer in enumerate(schedule.layers)))
        counts = zip(tried.layers, policy.counts(tried, num_visual), strict=True)
        fits = flops.average_tokens(num_visual, tuple(counts), num_layers) <= budget
        low, high = (ratio, high) if fits else (low, ratio)
    return Schedule(tuple((layer, low ** (i + 1)) for i, layer in enumerate(schedule.layers)))
