"""Comparison of a pruned model with the unattached one, on a prompt of its own: ``verify(model, inputs)``.

Every check has an oracle that shares nothing with the pruner's hooks: the unattached model, the unattached decoder
called with the survivors' inputs alone, or the weights that the model's eager attention returns.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from toprl_models.families import count_visual, family_of, min_stage_of, visual_token_ids
from toprl_models.methods.fastv import FastV
from toprl_models.policy import Policy, StageContext
from toprl_models.probe import blocked_stages, decoder_of, keyless_layers
from toprl_models.pruner import Mode, Pruner, attach
from toprl_models.schedule import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Outcome = Literal["exact", "refused", "wrong", "n/a"]
Inputs = Mapping[str, Any]
NEW_TOKENS = 4


@dataclass(frozen=True)
class Finding:
    """Outcome of one check; ``detail`` says more.

    "exact", "refused" by an error of this project, "wrong", or "n/a" where the unattached model cannot do it either.
    """

    check: str
    outcome: Outcome
    detail: str = ""


class _Even(Policy):
    """Keeps tokens that are spread evenly over the image; alike in every mode and batch."""

    uses_text = False

    def score(self, context: StageContext) -> Tensor:
        return (context.visual_index * 0.6180339887498949) % 1.0


def verify(model: PreTrainedModel, inputs: Inputs, *, tolerance: float = 1e-4) -> list[Finding]:
    """Check what pruning does to ``model`` on ``inputs``, with stages from the first possible layer on.

    Args:
        model: a model of transformers in eval mode, unattached.
        inputs: the processor's output for prompts with an image, without answers; text after the last image.
        tolerance: largest difference of logits, relative to their largest absolute value. 1e-4 suits float32.

    Returns:
        A finding for each check, in the order of ``CHECKS``.

    Raises:
        TypeError: no visual token of the model is a token of its decoder.
        ValueError: the prompt has no visual tokens, or the config no placeholder ids.
    """
    ids = visual_token_ids(model, family_of(model))
    if not any(count_visual(model, inputs)):
        raise ValueError(f"inputs: input_ids has none of the placeholder ids {ids}; give a prompt with an image")
    case = _Case(model, inputs, tolerance)
    with torch.no_grad():
        return [_finding(name, check, case) for name, check in CHECKS.items()]


def verdict(findings: list[Finding]) -> str:
    """Sum up the findings: "exact", "exact, but refused: ...", "refused: ..." or "wrong: ..."."""
    wrong = [f"{finding.check} ({finding.detail})" for finding in findings if finding.outcome == "wrong"]
    if wrong:
        return "wrong: " + "; ".join(wrong)
    refused = {finding.check: finding.detail for finding in findings if finding.outcome == "refused"}
    for needed in (REMOVAL, KEEP_ALL):
        if needed in refused:
            return f"refused: {refused[needed]}"
    return "exact" + (f", but refused: {', '.join(refused)}" if refused else "")


def summary(findings: list[Finding]) -> dict[str, str]:
    """Return the outcome for tables: "exact", "exact with limits", "refused" or "wrong", and the reasons by check."""
    found = {kind: {f.check: f.detail for f in findings if f.outcome == kind} for kind in ("wrong", "refused")}
    if found["wrong"]:
        return {"outcome": "wrong", **found["wrong"]}
    reasons = {name: reason.partition(": ")[2] for name, reason in found["refused"].items()}
    for needed in (REMOVAL, KEEP_ALL):
        if needed in reasons:
            return {"outcome": "refused", "why": reasons[needed]}
    return {"outcome": "exact with limits", **reasons} if reasons else {"outcome": "exact"}


class _Wrong(Exception):
    """A check that failed."""


class _NotApplicable(Exception):
    """A check that fails without the pruner."""


@dataclass
class _Case:
    model: PreTrainedModel
    inputs: Inputs
    tolerance: float

    def __post_init__(self) -> None:
        self.decoder = decoder_of(self.model)
        self.depth = len(self.decoder.layers)
        first = min_stage_of(self.model, family_of(self.model))
        self.first = Schedule(((first, 0.5),))
        blocked = blocked_stages(self.decoder)
        self.layers = [i for i in range(first, self.depth) if i not in blocked]
        inner = [layer for layer in self.layers if layer] or self.layers
        middle = [layer for layer in inner if layer <= max(first + 1, self.depth // 2)][-1]
        self.several = Schedule(tuple(zip(sorted({inner[0], middle, inner[-1]}), (0.5, 0.25, 2), strict=False)))
        # what was unattached when the checks began
        self.plain = self.forward()
        self.real = self.inputs["attention_mask"].bool()
        self.words = self.inputs["input_ids"][:, -3:].unique().tolist()

    def forward(self, **options: Any) -> Any:
        return self.model(**{**self.inputs, **options})

    def generate(self, **options: Any) -> tuple[Tensor, Tensor]:
        """Answer greedily: tokens [B, T] and logits [B, T, vocabulary]."""
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False} | options
        answer = self.model.generate(
            **self.inputs,
            return_dict_in_generate=True,
            output_logits=True,
            prefix_allowed_tokens_fn=lambda *_: self.words,  # a placeholder would want an image
            **options,
        )
        return answer.sequences[:, -NEW_TOKENS:], torch.stack(answer.logits, 1)

    def compare(self, what: str, found: Tensor, wanted: Tensor) -> None:
        if found.shape != wanted.shape:
            raise _Wrong(f"{what}: shape {tuple(found.shape)} instead of {tuple(wanted.shape)}")
        found, wanted = found.float(), wanted.float().to(found.device)
        error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        if not error <= self.tolerance:
            raise _Wrong(f"{what}: off by {error:.2g} of the largest")


def _finding(name: str, check: Callable[[_Case], None], case: _Case) -> Finding:
    try:
        check(case)
    except _Wrong as error:
        return Finding(name, "wrong", str(error))
    except _NotApplicable as error:
        return Finding(name, "n/a", str(error))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        ours = "toprl_models" in frame.filename and isinstance(error, ValueError | TypeError | RuntimeError)
        return Finding(name, "refused" if ours else "wrong", f"{type(error).__name__}: {error}")
    return Finding(name, "exact")


# -- the checks --------------------------------------------------------------------------------------------------------


def _slots(case: _Case) -> None:
    """Embeddings change at the visual slots, and there alone, when the pixels do."""
    pixels = {
        name: value * torch.randn_like(value)  # an image of zeros may be padding
        for name, value in case.inputs.items()
        if "pixel" in name and isinstance(value, Tensor) and value.is_floating_point()
    }
    before, after = _decoder_call(case, {}), _decoder_call(case, pixels)
    changed, visual = (before["inputs_embeds"] != after["inputs_embeds"]).flatten(2).any(-1), _visual(case)
    if not bool(changed.any()):  # features that the decoder adds between its layers alone
        masks = [
            mask.view(visual.shape) for name, mask in before.items() if name in ("vision_mask", "visual_pos_masks")
        ]
        if not masks or not torch.equal(masks[0], visual):
            raise _Wrong("no placeholder holds image features")
    elif bool((changed & ~visual).any()):
        raise _Wrong(f"{int((changed & ~visual).sum())} tokens hold image features, but are no placeholders")


def _keep_all(case: _Case) -> None:
    stages = tuple((layer, 1.0) for layer in dict.fromkeys(case.first.layers + case.several.layers))
    logits = case.generate()[1]
    uncached = case.forward(use_cache=False).logits
    with attach(case.model, _Even(), schedule=Schedule(stages)):
        case.compare("prompt", case.forward().logits[case.real], case.plain.logits[case.real])
        case.compare("without a cache", case.forward(use_cache=False).logits[case.real], uncached[case.real])
        case.compare("answer", case.generate()[1], logits)
    case.compare("after detach()", case.forward().logits[case.real], case.plain.logits[case.real])


def _removal(case: _Case) -> None:
    """Row by row, the decoder called with the survivors alone gives the logits of the pruned model."""
    for layer in dict.fromkeys((case.first.layers[0], case.several.layers[min(1, len(case.several) - 1)])):
        schedule = Schedule(((layer, 0.5),))
        with attach(case.model, _Even(), schedule=schedule) as pruner:
            output = case.forward(output_hidden_states=False)
            _check_trace(case, pruner.trace, output.logits, schedule)
            indices = pruner.trace[0].indices
        states = _last_states(case, schedule, "compact")
        for row, survivors in enumerate(_survivors(case, indices)):
            wanted = _by_hand(case, row, survivors, layer)
            case.compare(f"stage before layer {layer}", states[row, survivors], wanted)


def _masking(case: _Case) -> None:
    compact = _last_states(case, case.several, "compact")
    with attach(case.model, _Even(), schedule=case.several) as pruner:
        case.forward()
        indices, (_, logits) = pruner.trace[-1].indices, case.generate()
    masked = _last_states(case, case.several, "mask")
    for row, survivors in enumerate(_survivors(case, indices)):
        case.compare("prompt", masked[row, survivors], compact[row, survivors])
    with attach(case.model, _Even(), schedule=case.several, mode="mask"):
        case.compare("answer", case.generate()[1], logits)
        everything = Schedule(tuple((layer, 1.0) for layer in case.several.layers))
    with attach(case.model, _Even(), schedule=everything, mode="mask"):
        case.compare("keep-all", case.forward().logits[case.real], case.plain.logits[case.real])


def _lengths(case: _Case) -> None:
    """Every layer's cache holds what the schedule says."""
    schedule = case.several
    with attach(case.model, _Even(), schedule=schedule):
        cache = case.forward(use_cache=True).past_key_values
    if cache is None:
        raise _NotApplicable("the model returns no cache")
    totals = case.real.sum(1).tolist()
    counts = [schedule.counts(number) for number in count_visual(case.model, case.inputs)]
    visual = count_visual(case.model, case.inputs)
    for index in set(range(case.depth)) - keyless_layers(case.decoder.layers):
        stage = sum(layer <= index for layer in schedule.layers) - 1
        rows = zip(totals, visual, counts, strict=True)
        wanted = max(total - (of - kept[stage] if stage >= 0 else 0) for total, of, kept in rows)
        wanted = case.real.shape[1] if stage < 0 else wanted
        keys = getattr(cache.layers[index], "keys", None) if index < len(cache.layers) else None
        if keys is not None and keys.ndim == 4:
            found = cache.layers[index].keys.shape[-2]
            if getattr(cache.layers[index], "is_sliding", False):
                wanted = min(wanted, cache.layers[index].sliding_window - 1)
            if found != wanted:
                raise _Wrong(f"layer {index} holds {found} keys instead of {wanted}")


def _answer(case: _Case) -> None:
    """Decoding steps end in the states that the survivors and the answer, in one prompt, have."""
    layer, length = case.several.layers[0], case.real.shape[1]

    def compare(pruner: Pruner | None) -> None:
        with _watch_decoder(case) as seen:
            tokens, _ = case.generate()
        steps = torch.cat([states[:, -1:] for states in seen["outputs"][1:]], 1)
        rows = [row.nonzero()[:, 0] for row in case.real]
        if pruner is not None:
            rows = _survivors(case, pruner.trace[0].indices)
            pruner.detach()
        longer = replace(case, inputs=_appended(case.inputs, tokens[:, :-1]))
        for row, kept in enumerate(rows):
            kept = torch.cat([kept, length + torch.arange(NEW_TOKENS - 1, device=kept.device)])
            case.compare("states", steps[row], _by_hand(longer, row, kept, layer)[1 - NEW_TOKENS :])

    try:
        compare(None)
    except Exception as error:
        raise _NotApplicable(f"the unattached model: {error}") from error
    with attach(case.model, _Even(), schedule=Schedule(((layer, 0.5),))) as pruner:
        compare(pruner)


def _appended(inputs: Inputs, tokens: Tensor) -> dict[str, Any]:
    """Append words to the prompts; other arguments with a number for each token get zeros."""
    shape, longer = inputs["input_ids"].shape, dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == shape:
            more = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}.get(name, torch.zeros_like(tokens))
            longer[name] = torch.cat([value, more.to(value.dtype)], 1)
    return longer


def _step(case: _Case) -> None:
    """A next token that comes without position_ids gets the logits that generate() computes for it."""

    def step(tokens: Tensor) -> Tensor:
        mask = case.inputs["attention_mask"]
        longer = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        cache = case.forward(use_cache=True).past_key_values
        return case.model(input_ids=tokens, attention_mask=longer, past_key_values=cache).logits[:, -1]

    tokens, logits = case.generate()
    try:
        case.compare("step", step(tokens[:, :1]), logits[:, 1])
    except Exception as error:
        raise _NotApplicable(f"the unattached model: {error}") from error
    with attach(case.model, _Even(), schedule=case.several):
        tokens, logits = case.generate()
        case.compare("step", step(tokens[:, :1]), logits[:, 1])


def _scores(case: _Case) -> None:
    """FastV's scores are the mean over heads of the model's own eager attention weights."""
    first = min(_attention_layers(case))
    layer = min((layer for layer in case.layers if layer > first + 1), default=first + 1)
    with _attention_of(case.model, "eager"):
        with attach(case.model, FastV(), schedule=Schedule(((layer, 0.5),))) as pruner:
            case.forward()
            found = pruner.trace[0]
        attentions = case.forward(output_attentions=True).attentions
    weights = {number: item for number, item in zip(_attention_layers(case), attentions, strict=False)}
    source = max(number for number in weights if number < layer) if len(weights) == len(attentions) else layer - 1
    item = weights.get(source)
    if item is None:
        raise _Wrong(f"the model returns no attention weights of layer {source}")
    for row, slots in enumerate(_visual_slots(case)):
        if not len(slots):
            continue
        last = int(case.real[row].nonzero()[-1])
        case.compare("scores", found.scores[row, : len(slots)], item[row, :, last].mean(0)[slots])


KEEP_ALL = "keep-all = unattached"
REMOVAL = "compact = tokens cut out by hand"
CHECKS: dict[str, Callable[[_Case], None]] = {
    "visual slots hold image features": _slots,
    KEEP_ALL: _keep_all,
    REMOVAL: _removal,
    "answer = answer in the prompt": _answer,
    "mask mode = compact mode": _masking,
    "cache lengths": _lengths,
    "a step without position_ids": _step,
    "attention scores = eager": _scores,
}


# -- oracles -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _attention_of(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Switch the decoder's attention within this context."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    # the empty name stands for the model's config where that is the decoder's, too
    place = next((name for name in model.config.sub_configs if getattr(model.config, name, None) is config), "")
    model.set_attn_implementation({place: implementation})
    try:
        yield
    finally:
        model.set_attn_implementation({place: before})


def _attention_layers(case: _Case) -> list[int]:
    return sorted(set(range(case.depth)) - keyless_layers(case.decoder.layers))


def _visual(case: _Case) -> Tensor:
    """Mark the placeholders, bool [B, N]."""
    ids = torch.tensor([*visual_token_ids(case.model, family_of(case.model)).values()], device=case.real.device)
    return torch.isin(case.inputs["input_ids"], ids) & case.real


def _visual_slots(case: _Case) -> list[Tensor]:
    return [row.nonzero()[:, 0] for row in _visual(case)]


def _survivors(case: _Case, indices: Tensor) -> list[Tensor]:
    """Slots [m] of the tokens of each row that are no padding and were not dropped."""
    rows = []
    for row, slots in enumerate(_visual_slots(case)):
        keep = case.real[row].clone()
        keep[slots] = False
        keep[slots[indices[row][indices[row] >= 0]]] = True
        rows.append(keep.nonzero()[:, 0])
    return rows


def _check_trace(case: _Case, trace: list[Any], logits: Tensor, schedule: Schedule) -> None:
    wanted = tuple(schedule.counts(number)[0] for number in count_visual(case.model, case.inputs))
    if not trace or trace[0].counts != wanted:
        raise _Wrong(f"kept {trace[0].counts if trace else 'everything'} instead of {wanted}")
    if logits.shape[:2] != case.plain.logits.shape[:2]:
        raise _Wrong(f"logits {tuple(logits.shape)} instead of {tuple(case.plain.logits.shape)}")


def _last_states(case: _Case, schedule: Schedule, mode: Mode) -> Tensor:
    """States [B, N, d] that leave the decoder."""
    with attach(case.model, _Even(), schedule=schedule, mode=mode), _watch_decoder(case) as seen:
        case.forward()
    return seen["output"]


@contextlib.contextmanager
def _watch_decoder(case: _Case) -> Iterator[dict[str, Any]]:
    """Note the decoder's arguments and its last hidden state."""
    seen: dict[str, Any] = {"outputs": []}

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["entered"] = args[0] if args else kwargs["hidden_states"]

    def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen.update(kwargs=dict(kwargs), args=args, output=output.last_hidden_state)
        seen["outputs"].append(output.last_hidden_state)

    handles = [
        case.decoder.layers[0].register_forward_pre_hook(enter, with_kwargs=True),
        case.decoder.register_forward_hook(leave, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _decoder_call(case: _Case, changes: Inputs) -> dict[str, Any]:
    """Run the unattached model; return the keyword arguments of its decoder."""
    with _watch_decoder(case) as seen:
        case.forward(**changes, use_cache=False)
    arguments = seen["kwargs"] | ({"inputs_embeds": seen["args"][0]} if seen["args"] else {})
    if arguments.get("inputs_embeds") is None:  # a decoder that makes the embeddings itself
        arguments = {name: value for name, value in arguments.items() if name not in ("input_ids", "pixel_values")}
        arguments["inputs_embeds"] = seen["entered"]
    return arguments


@dataclass
class _Cut:
    """Cuts one row's tokens out of the decoder's arguments."""

    row: int
    kept: Tensor  # int64 [m], slots
    length: int
    visual: Tensor  # bool [B, N]

    def __call__(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self(part) for name, part in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        if value.ndim == 2 and len(value) == int(self.visual.sum()):  # a row for each visual token of all prompts
            alive = torch.zeros_like(self.visual)
            alive[self.row, self.kept] = True
            return value[alive[self.visual]]
        if self.length not in value.shape:
            return value
        if value.ndim == 4 and value.shape[2:] == (self.length, self.length):
            value = value[self.row : self.row + 1] if len(value) > 1 else value
            return value[:, :, self.kept][:, :, :, self.kept]
        at = value.shape.index(self.length)
        if at and value.shape[at - 1] > 1:
            value = value.narrow(at - 1, self.row, 1)
        return value.index_select(at, self.kept)


def _by_hand(case: _Case, row: int, kept: Tensor, layer: int) -> Tensor:
    """Last states [m, d] of the unattached decoder, called with the survivors of one row from ``layer`` on.

    The layers before see the whole row; their states are cut before ``layer``, and the decoder makes its masks and
    rotary tables for the survivors' positions.
    """
    arguments = _decoder_call(case, {})
    length = case.real.shape[1]
    if arguments.get("position_ids") is None and "position_ids" in inspect.signature(case.decoder.forward).parameters:
        arguments["position_ids"] = torch.arange(length, device=case.real.device)[None]
    real = case.real[row].nonzero()[:, 0]
    arguments.pop("past_key_values", None)
    visual = _visual(case)
    alone, cut = (_Cut(row, tokens, length, visual)(arguments) for tokens in (real, kept))
    entered: dict[nn.Module, Any] = {}  # masks of all layers from ``layer`` on, and the states that enter it
    first = case.decoder.layers[layer]

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        entered[module] = args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")

    def substitute(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        alive = torch.isin(real, kept)
        states, mask = entered[module]
        if isinstance(mask, Tensor) and mask.ndim == 4:  # the model's own, for the tokens' original places
            kwargs = kwargs | {"attention_mask": mask[:, :, alive][:, :, :, alive]}
        if module is not first:
            return args, kwargs
        states = states[:, alive]
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    for hook, arguments in ((note, alone), (substitute, cut)):
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in case.decoder.layers[layer:]]
        try:
            states = case.decoder(**arguments | {"use_cache": False}).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
    return states[0]
