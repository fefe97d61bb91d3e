"""Pruning methods by name, and the schedule that gives each of them the same budget.

schedule_for("fastv", 192)                        # 192 of LLaVA-1.5's 576 tokens, averaged over 32 layers
schedule_for(model, "divprune+fastv", keep=0.25)  # two methods, a quarter of the tokens of any prompt
method_of("my_file.py:MyMethod").make()           # a Policy class of your own file
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from toprl_kernels import flops
from toprl_models.families import Family, count_visual, family_of, min_stage_of
from toprl_models.policy import Policy
from toprl_models.probe import decoder_of
from toprl_models.runtime.scores import fitting_layers
from toprl_models.schedule import PAPER_LAYERS, PAPER_STAGES, Schedule, stage_layers_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Visual tokens of LLaVA-1.5, on which the authors state their settings
PAPER_TOKENS = 576
BEFORE_LLM = (0,)
ALL_INPUTS = ("images", "videos")
Factory = TypeVar("Factory", bound=Callable[..., Policy])


@dataclass(frozen=True)
class Method:
    """A pruning method, or several methods that follow each other.

    Attributes:
        name: as in tables' files and on command lines.
        title: for people.
        paper: where the method is from.
        policy: makes the policy with the authors' defaults; a trained method's needs arguments, see ``make``.
        stages: the layers that prune in a decoder of 32 layers.
        staged: the method may prune at any layers, any number of them.
        merges: after a stage there are more tokens than the schedule says: ``Policy.counts`` tells how many.
        authors: tokens that the authors keep at each stage, of 576 in 32 layers, by what they call the budget.
        from_trained: makes the policy of a trained ``TopRLPolicy`` and the stages' layers; None where none is needed.
        refuses: says why the method does not apply to a family; "" where it does.
        inputs: what the method is defined for, "images" and "videos" or one of them.
        parts: of a composition, the method of each stage; () for a plain method.
    """

    name: str
    title: str
    paper: str
    policy: Callable[..., Policy]
    stages: tuple[int, ...] = PAPER_STAGES
    staged: bool = False
    merges: bool = False
    authors: Mapping[float, tuple[int, ...]] = field(default_factory=dict, hash=False)
    from_trained: Callable[[Policy, tuple[int, ...]], Policy] | None = None
    refuses: Callable[[Family], str] = lambda family: ""
    inputs: tuple[str, ...] = ALL_INPUTS
    parts: tuple[Method, ...] = ()

    @property
    def trained(self) -> bool:
        """Tell whether the method needs a trained ``TopRLPolicy``."""
        return self.from_trained is not None or any(part.trained for part in self.parts)

    def layers(self, num_layers: int, first: int = 0, trained: Sequence[int] = ()) -> tuple[int, ...]:
        """Scale the stages to a decoder of ``num_layers`` layers.

        Args:
            num_layers: decoder layers.
            first: first layer that may prune; a method that prunes before layer 0 ignores it.
            trained: stages of the trained policy, which a method of several stages takes over.

        Raises:
            ValueError: the decoder is too shallow.
        """
        if not self.parts:
            if trained and self.staged and self.trained:
                return tuple(trained)
            early: tuple[int, ...] = BEFORE_LLM if self.stages[0] == 0 else ()
            inside = self.stages[len(early) :]
            return early + (stage_layers_for(num_layers, max(1, first), inside) if inside else ())
        layers: list[int] = []  # of each part the first stage after the parts before
        for part in self.parts:
            stages = part.layers(num_layers, first, trained)
            later = [layer for layer in stages if not layers or layer > layers[-1]]
            if not later:
                raise ValueError(
                    f"method {self.name!r}: {part.name} prunes before layers {stages}, none of them after layer "
                    f"{layers[-1]}, where the method before it prunes; change the order, or name the layers"
                )
            layers.append(later[0])
        return tuple(layers)

    def make(self, layers: tuple[int, ...] = (), trained: Policy | None = None) -> Policy:
        """Make the policy.

        Args:
            layers: the stages; needed by composed and one-shot methods.
            trained: the ``TopRLPolicy`` of a trained method.

        Raises:
            ValueError: a trained method without ``trained``, or another number of layers than parts.
        """
        if self.parts:
            from toprl_models.methods.compose import Compose

            if len(layers) != len(self.parts):
                raise ValueError(f"method {self.name!r}: {len(self.parts)} stages are needed, not layers {layers}")
            pairs = zip(self.parts, layers, strict=True)
            return Compose([part.make((layer,), trained) for part, layer in pairs])
        if self.from_trained is None:
            return self.policy()
        if trained is None:
            raise ValueError(f"method {self.name!r} needs a trained policy: the folder that training/ppo.py wrote")
        return self.from_trained(trained, layers)


# The registry, in the order of tables: all methods of toprl_models.methods, and those of plug-ins once asked for
METHODS: dict[str, Method] = {}


def register_method(
    name: str,
    title: str = "",
    paper: str = "",
    *,
    stages: tuple[int, ...] = PAPER_STAGES,
    staged: bool = False,
    merges: bool = False,
    authors: Mapping[float, tuple[int, ...]] | None = None,
    from_trained: Callable[[Policy, tuple[int, ...]], Policy] | None = None,
    refuses: Callable[[Family], str] = Method.refuses,
    inputs: tuple[str, ...] = ALL_INPUTS,
) -> Callable[[Factory], Factory]:
    """Register a pruning method; a decorator of its ``Policy`` class, or of a function that makes the policy.

    Args:
        name: as on command lines, without ":" and "+"; an earlier method of the same name is replaced.
        title: for people; by default the class's name.
        paper: where the method is from.
        stages, staged, merges, authors, from_trained, refuses, inputs: as in ``Method``.

    Raises:
        ValueError: a name with ":" or "+", which stand for files and compositions.

    Example:
        >>> @register_method("brightest", "Largest states", stages=(2,))
        ... class Brightest(Policy):
        ...     def score(self, context):
        ...         return context.hidden_states.norm(dim=-1)
    """
    if not name or ":" in name or "+" in name:
        raise ValueError(f'name={name!r} must not be empty, nor hold ":" (a file) or "+" (a composition)')

    def register(policy: Factory) -> Factory:
        known_as = title or getattr(policy, "__name__", name)
        METHODS[name] = Method(
            name, known_as, paper, policy, stages, staged, merges, authors or {}, from_trained, refuses, inputs
        )
        return policy

    return register


def method_of(name: str) -> Method:
    """Return the method called ``name``.

    Args:
        name: a name of ``METHODS`` or of an installed plug-in (entry-point group ``toprl.methods``), a class in a file,
            "my_file.py:MyMethod", or several of these joined by "+", of which each decides at one stage.

    Raises:
        ValueError: unknown name (the message lists the known ones), no such file or class, or not a ``Policy``.
        ImportError: the plug-in, or the file, cannot be imported.
    """
    from toprl_models import plugins

    if "+" in name:
        return _composed(name)
    if ":" in name:
        return plugins.method_in_file(name)
    if name not in METHODS and not plugins.load(name):
        known = ", ".join([*METHODS, *plugins.names()])
        raise ValueError(
            f"method {name!r} is unknown; known methods: {known}; a class of your own is my_file.py:MyMethod, several "
            "methods are joined by +"
        )
    return METHODS[name]


def layers_for(method: Method, model: PreTrainedModel, trained: Sequence[int] = ()) -> tuple[int, ...]:
    """Scale a method's stages to ``model``, each moved on to the first layer that offers what the method reads.

    Layers of linear attention and convolutions (Qwen3.5, LFM2-VL) have no attention weights: PyramidDrop prunes before
    a layer that has them, FastV after one. Of several stages of one method those that find no layer are left out.

    Args:
        method: a plain or composed method.
        model: gives depth, kinds of layers and the first one that may prune.
        trained: stages of the trained policy, which stay where they are.
    """
    decoder = decoder_of(model)
    layers = method.layers(len(decoder.layers), min_stage_of(model, family_of(model)), trained)
    if method.trained:
        return layers
    policy = method.make(layers)
    moved = fitting_layers(decoder, layers, [policy.at_stage(number).attention_from for number in range(len(layers))])
    # a composition needs a layer for each part: attach tells which has none
    return layers if not moved or (method.parts and len(moved) < len(layers)) else moved


def _composed(name: str) -> Method:
    """Compose the methods that "+" joins in ``name``."""
    from toprl_models.methods.compose import Compose

    parts = tuple(method_of(part.strip()) for part in name.split("+"))
    return Method(
        name,
        " + ".join(part.title for part in parts),
        "; ".join(dict.fromkeys(part.paper for part in parts if part.paper)),
        Compose,
        stages=(),
        merges=any(part.merges for part in parts),
        refuses=lambda family: next((reason for part in parts if (reason := part.refuses(family))), ""),
        inputs=tuple(kind for kind in ALL_INPUTS if all(kind in part.inputs for part in parts)),
        parts=parts,
    )


def schedule_for(
    model: PreTrainedModel | str,
    method: str | float | None = None,
    *,
    keep: float | None = None,
    average_tokens: float | None = None,
    inputs: Mapping[str, Any] | None = None,
    num_visual: int | None = None,
    num_layers: int | None = None,
    layers: tuple[int, ...] | None = None,
) -> Schedule:
    """Return the authors' setting of a method for a budget, or where they state none the schedule that meets it.

    Methods of one stage keep k tokens so that the average over all layers is the budget (FastV: k = (B L - N K) /
    (L - K)); methods of several keep r, r^2, ... of the tokens. SparseVLM's authors count the layer that prunes as
    pruned: their 192, 128 and 64 are 206.5, 145.4 and 82.2 on average.

    Args:
        model: the model, which gives the depth and the first layer that may prune. Without a model the method's name
            comes first and ``average_tokens`` second, and the defaults are those of LLaVA-1.5.
        method: a name that ``method_of`` takes.
        keep: wanted share of the visual tokens, averaged over all decoder layers. The schedule then has shares, which
            hold for images of any size.
        average_tokens: instead of ``keep``, wanted number of visual tokens, averaged over all decoder layers.
        inputs: what the processor returned for a prompt or batch: its visual tokens are counted. Prompts that differ in
            them keep the same share, and their mean meets ``average_tokens``.
        num_visual: instead of ``inputs``, visual tokens of a prompt.
        num_layers: decoder layers.
        layers: the stages; by default those of the authors, scaled to the model by ``layers_for``.

    Raises:
        ValueError: unknown method, no or two budgets, ``average_tokens`` for a model without ``inputs`` or
            ``num_visual``, or a budget that these stages cannot meet; the message states the floor.

    Example:
        >>> schedule_for("fastv", 192).counts(576)
        (166,)
        >>> schedule_for("sparsevlm", 192).stages
        ((3, 300), (7, 200), (16, 110))
        >>> schedule_for("fastv", keep=0.5).counts(576)
        (269,)
    """
    if isinstance(model, str):
        if isinstance(method, str):
            raise ValueError(
                f"average_tokens={method!r} must be a number; schedule_for takes a model, not a model's name"
            )
        average_tokens = average_tokens if method is None else method
        info, known, first, depth = method_of(model), None, 0, num_layers or PAPER_LAYERS
    else:
        depth = num_layers or model.config.get_text_config().num_hidden_layers
        info, known, first = method_of(str(method)), model, min_stage_of(model, family_of(model))
    if layers is not None:
        chosen = tuple(layers)
    else:
        chosen = info.layers(depth, first) if known is None or num_layers else layers_for(info, known)
    tokens, alike = _tokens_of(known, inputs, num_visual)
    if keep is not None and average_tokens is None:
        floor = chosen[0] / depth
        if not floor <= keep <= 1:
            raise ValueError(
                f"keep={keep} is impossible with stages at {chosen}: the first {chosen[0]} of {depth} layers see all "
                f"visual tokens, so it lies between {floor:.3g} and 1"
            )
        tokens = tokens or PAPER_TOKENS
        return in_shares(_solve(info, keep * tokens, chosen, tokens, depth), tokens)
    if keep is not None or average_tokens is None:
        raise ValueError(f"keep={keep}, average_tokens={average_tokens}: give one of them")
    if tokens is None:
        raise ValueError(
            f"average_tokens={average_tokens}: of how many visual tokens? Pass inputs= (what the processor returned) "
            "or num_visual=, or say keep=, a share"
        )
    schedule = _solve(info, average_tokens, chosen, tokens, depth)
    return schedule if alike else in_shares(schedule, tokens)


def in_shares(schedule: Schedule, num_visual: int) -> Schedule:
    """Turn numbers of tokens, out of ``num_visual``, into shares, which hold for images of any size."""
    stages = ((layer, keep / num_visual if isinstance(keep, int) else keep) for layer, keep in schedule.stages)
    return replace(schedule, stages=tuple(stages))


def _tokens_of(
    model: PreTrainedModel | None, inputs: Mapping[str, Any] | None, num_visual: int | None
) -> tuple[int | None, bool]:
    """Count the visual tokens of a prompt (None: unknown), and tell whether all prompts have as many."""
    if num_visual is not None or inputs is None:
        return PAPER_TOKENS if num_visual is None and model is None else num_visual, True
    if model is None:
        raise ValueError(
            'inputs: whose placeholders are counted? Pass the model first, schedule_for(model, "fastv", ...)'
        )
    counts = [count for count in count_visual(model, inputs) if count]
    if not counts:
        raise ValueError("inputs: no prompt has a visual token; pass the processor's output for a prompt with an image")
    return round(statistics.fmean(counts)), len(set(counts)) == 1


def _solve(info: Method, average_tokens: float, layers: tuple[int, ...], num_visual: int, num_layers: int) -> Schedule:
    """Take the authors' numbers where they state them, else solve for keeps r, r^2, ... that meet the budget."""
    stated = (num_visual, num_layers, layers) == (PAPER_TOKENS, PAPER_LAYERS, info.stages)
    if stated and average_tokens in info.authors:
        return Schedule(tuple(zip(layers, info.authors[average_tokens], strict=True)))
    schedule = Schedule.for_budget(average_tokens, layers, num_visual=num_visual, num_layers=num_layers)
    return _less_merged(info, schedule, average_tokens, num_visual, num_layers) if info.merges else schedule


def _less_merged(info: Method, schedule: Schedule, budget: float, num_visual: int, num_layers: int) -> Schedule:
    """Lower the keeps of ``schedule`` until the tokens merged at the stages are within the budget, too."""
    policy = info.make(schedule.layers, trained=Policy())  # which is asked for its counts alone
    low, high = 0.0, float(schedule.stages[0][1])
    for _ in range(40):  # counts are whole numbers: the share needs no more precision
        ratio = (low + high) / 2
        tried = Schedule(tuple((layer, ratio ** (i + 1)) for i, layer in enumerate(schedule.layers)))
        counts = zip(tried.layers, policy.counts(tried, num_visual), strict=True)
        fits = flops.average_tokens(num_visual, tuple(counts), num_layers) <= budget
        low, high = (ratio, high) if fits else (low, ratio)
    return Schedule(tuple((layer, low ** (i + 1)) for i, layer in enumerate(schedule.layers)))
