"""Reader of a model's arguments: visual slots, padding, packed prompts, and where each prompt ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from toprl_models.families import Family, placeholder_ids
from toprl_models.policy import Decision
from toprl_models.runtime.state import ForwardPass, Packing, Prompts, Segment, Visual, on_device, take, visual_of

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig, PreTrainedModel


@dataclass(frozen=True)
class VisualIds:
    """Placeholder ids by the kind of input that fills them."""

    images: tuple[int, ...]
    videos: tuple[int, ...]
    merge_size: int = 1  # side of the square of patches that becomes a token

    @classmethod
    def of(cls, model: PreTrainedModel, family: Family) -> VisualIds:
        vision = getattr(model.config, "vision_config", None)
        return cls(*placeholder_ids(model, family), getattr(vision, "spatial_merge_size", 1))

    def frame_starts(self, inputs: Mapping[str, Any]) -> Tensor | bool:
        """Find the first token of each frame of the videos, bool ``[B, N]``, where ``video_grid_thw`` tells frames."""
        tokens, grid = inputs.get("input_ids"), inputs.get("video_grid_thw")
        if tokens is None or grid is None:
            return False
        is_video = torch.isin(tokens, on_device(self.videos, tokens.device))
        rank = (is_video.flatten().cumsum(0) - 1).view_as(tokens)
        frame = grid[:, 1] * grid[:, 2] // self.merge_size**2
        ends = (grid[:, 0] * frame).cumsum(0)
        video = torch.searchsorted(ends, rank.clamp(min=0), right=True).clamp(max=len(grid) - 1)
        offset = rank - (ends - grid[:, 0] * frame)[video]
        return is_video & (offset % frame[video] == 0)

    def brought(self, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the ids whose inputs came along: a *generated* token may carry the id of an image or a video."""
        encoded = kwargs.get("mm_encoder_outputs") or {}
        names = [name for name, value in kwargs.items() if "pixel_values" in name and value is not None]
        names += [name for name, value in encoded.items() if value is not None]
        videos = sum("video" in name for name in names)
        return (self.images if len(names) > videos else ()) + (self.videos if videos else ())


@dataclass
class Told:
    """Facts about the prompt that the caller adds to the base model's arguments.

    Attributes:
        prompt_length: slots of the prompt, counted from the start of the sequence (of each packed prompt), padding and
            cached tokens included: an int, or int64 with a number for each prompt.
        visual_mask: bool ``[B, N]``, the slots whose ``inputs_embeds`` hold image features.
        labels: ``[B, N]``; ``shifted`` when they are transformers' ``shift_labels``.
        reached: whether the call has come to the decoder.
    """

    prompt_length: int | Tensor | None = None
    visual_mask: Tensor | None = None
    labels: Tensor | None = None
    shifted: bool = False
    reached: bool = False

    @classmethod
    def pop_from(cls, kwargs: dict[str, Any]) -> Told:
        """Take ``prompt_length`` and ``visual_mask`` out of a call's keyword arguments and note its labels."""
        told = cls(kwargs.pop("prompt_length", None), kwargs.pop("visual_mask", None), kwargs.get("labels"))
        if kwargs.get("shift_labels") is not None:
            told.labels, told.shifted = kwargs["shift_labels"], True
        return told


@dataclass
class Generation:
    """A call of ``generate()``: its prompt's length, and the decisions, which no cache may hold."""

    length: int | None
    beams: int
    told: Told = field(default_factory=Told)
    past: int | None = None  # cached tokens that its ids leave out; None before the first pass
    num_visual: tuple[int, ...] = ()
    decisions: dict[int, tuple[Decision, tuple[int, ...]]] = field(default_factory=dict)

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any], default: GenerationConfig) -> Generation:
        """Read the arguments of ``generate()``; ``default`` is the model's generation config.

        What only the pruner understands is taken out of ``kwargs``.
        """
        told = Told.pop_from(kwargs)
        tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        config = kwargs.get("generation_config") or default
        beams = kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1
        return cls(None if tokens is None else tokens.shape[1], beams, told=told)

    def tell(self, told: Told, tokens: Tensor, cache: Cache | None) -> None:
        """Add what ``generate()`` was told to what its forward pass over ``tokens`` [B, N, ...] was told."""
        if told.prompt_length is None:
            told.prompt_length = self.told.prompt_length
        told.prompt_length = _repeated(told.prompt_length, len(tokens))
        mask = self.told.visual_mask
        if mask is not None and tokens.ndim == 3:
            past = 0 if cache is None else int(cache.get_seq_length())
            if self.length in (tokens.shape[1], past + tokens.shape[1]):
                told.visual_mask = _repeated(mask[:, -tokens.shape[1] :], len(tokens))

    def recall(self, stage: int, forward: ForwardPass) -> tuple[Decision, tuple[int, ...]] | None:
        """Return what this stage decided for the same prompt, without its answer."""
        known = self.decisions.get(stage)
        if known is None or self.num_visual != forward.num_visual:
            return None
        if self.beams > 1:
            alike = known[0].scores.unflatten(0, (-1, self.beams))
            if not bool((alike == alike[:, :1]).all()):
                raise ValueError(
                    f"use_cache=False with num_beams={self.beams}: the policy prunes the beams of a sample "
                    "differently, and without a cache nothing tells which beam is which: use a cache"
                )
        return known


def _repeated(value: int | Tensor | None, batch: int) -> Any:
    """Repeat the rows of a tensor for beams and several answers; other values stay."""
    return value.repeat_interleave(batch // len(value), 0) if isinstance(value, Tensor) and value.ndim else value


@dataclass
class Call:
    """Facts of a call of the base model that pruning needs; B rows, N tokens of this pass."""

    shape: tuple[int, int]
    visual: Tensor | None = None  # bool [B, N], None when no images came along
    valid: Tensor | None = None  # bool [B, N], None when all tokens are real
    past: int = 0  # tokens in the cache
    past_valid: Tensor | None = None  # bool [B, past], None when all of them are real
    starts: Tensor | None = None  # bool [B, N], first token of each prompt; None when a row is a prompt
    separate: Tensor | None = None  # bool [], whether a 4-D mask is that of separate causal prompts
    told: Told = field(default_factory=Told)
    generates: int | None = None  # length of the prompt that generate() began with
    uncached: bool = False  # generate() runs without a cache


def open_slots(mask: Tensor) -> Tensor:
    """Return a 4-D attention mask as bool ``[B, n, L]``, True where a query sees a key."""
    mask = mask[:, 0]
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()


def padding_of(mask: object, length: int, new: int) -> Tensor | None:
    """Find the real tokens, bool ``[B, n]``, n <= ``length``; None when the mask does not tell.

    ``mask`` is a model's argument, 2-D, or 4-D as generate() prepares it for a static cache. It covers ``length``
    tokens, of which ``new`` are of this pass and the others in the cache.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"attention_mask is a {type(mask).__name__}; pass the 2-D padding mask while a Pruner is attached"
        )
    if mask.ndim == 4:  # a real token sees itself; a cached one is seen by some
        visible, past = open_slots(mask), length - new
        return torch.cat([visible[:, :, :past].any(1), visible.diagonal(past, 1, 2)[:, :new]], 1)
    return mask[:, :length].bool()


def starts_of(mask: object, valid: Tensor | None, past: int, length: int) -> tuple[Tensor, Tensor] | None:
    """Find where prompts start that a 4-D mask packs into a row, and whether they are apart and causal."""
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    visible = open_slots(mask)[:, :, past : past + length]
    real = torch.ones_like(visible[:, 0]) if valid is None else valid
    sees_neighbour = visible.diagonal(-1, 1, 2) & real[:, :-1]
    starts = real & pad(~sees_neighbour, (1, 0), value=True)
    number = starts.cumsum(1)
    expected = (number[:, :, None] == number[:, None]) & real[:, None] & real[:, :, None]
    above = torch.ones_like(expected[0]).triu(1)  # tokens of an image may see each other
    return starts, ((visible == expected) | above | ~real[:, :, None]).all()


def starts_by_position(kwargs: Mapping[str, Any], length: int, decoder: PreTrainedModel) -> Tensor | None:
    """Find where prompts start that ``cu_seq_lens_q`` or ``position_ids`` pack into a row, as the model does."""
    flash, bounds = "flash" in decoder.config._attn_implementation, kwargs.get("cu_seq_lens_q")
    if kwargs.get("attention_mask") is not None:
        return None
    if flash and bounds is not None:
        starts = torch.zeros(1, length + 1, dtype=torch.bool, device=bounds.device)
        return starts.scatter(1, bounds[None].long(), True)[:, :length]
    positions, use_cache = kwargs.get("position_ids"), kwargs.get("use_cache")
    if positions is None or (positions.ndim == 3 and len(positions) != 4):
        return None  # M-RoPE without text positions: transformers looks at no packing
    positions = positions[0] if positions.ndim == 3 else positions
    if flash:
        packs = len(positions) == 1
    else:
        use_cache = decoder.config.use_cache if use_cache is None else use_cache
        if getattr(decoder, "gradient_checkpointing", False) and decoder.training:
            use_cache = False  # transformers switches the cache off
        packs = kwargs.get("past_key_values") is None and not use_cache
    return positions.diff(dim=-1, prepend=positions[:, :1]).ne(1) if packs else None


def find_placeholders(ids: tuple[int, ...], tokens: Tensor, embedding: Callable[[], nn.Module]) -> Tensor:
    """Find where ``tokens``, ids [B, N] or embeddings [B, N, d], stand for visual tokens: bool [B, N].

    Embeddings are compared with those of the ids, as the models do it.
    """
    wanted = on_device(ids, tokens.device)
    if tokens.ndim == 2:
        return torch.isin(tokens, wanted)
    return torch.stack([(tokens == state).all(-1) for state in embedding()(wanted)]).any(0)


def tokens_of(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the ids ``[B, N]`` or embeddings ``[B, N, d]`` that the base model was called with."""
    tokens = args[0] if args else kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if tokens is None else tokens


def read_call(
    ids: VisualIds,
    tokens: Tensor | None,
    kwargs: Mapping[str, Any],
    told: Told,
    embedding: Callable[[], nn.Module],
    decoder: PreTrainedModel,
) -> Call | None:
    """Read a call of the base model, whose token embedding ``embedding`` returns; None for a decoding step."""
    brought = ids.brought(kwargs)
    if tokens is None or (not brought and told.visual_mask is None and tokens.shape[1] == 1):
        return None
    batch, length = tokens.shape[:2]
    cache = kwargs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    mask = kwargs.get("attention_mask")
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    padding = padding_of(mask, past + length, length)
    call = Call((batch, length), past=past, told=told)
    if padding is not None:
        padding = padding.expand(batch, -1)
        call.valid = padding[:, -length:]
        call.past_valid = padding[:, :past] if past and padding.shape[1] == past + length else None
    types = kwargs.get("mm_token_type_ids")
    if told.visual_mask is not None:
        call.visual = _checked(told.visual_mask, "visual_mask", batch, length).bool()
    elif brought:
        call.visual = find_placeholders(brought, tokens, embedding)
    elif tokens.ndim == 3 and types is not None:  # embeddings that hold the features
        call.visual = _checked(types, "mm_token_type_ids", batch, length) > 0
    if call.visual is not None:
        apart = starts_of(mask, call.valid, past, length)
        if apart is not None:
            call.starts, call.separate = apart
        elif not past:
            starts = starts_by_position(kwargs, length, decoder)
            call.starts = None if starts is None else starts.expand(batch, -1)
    return call


def _checked(mask: Tensor, name: str, batch: int, length: int) -> Tensor:
    if mask.shape != (batch, length):
        raise ValueError(
            f"{name}: shape {tuple(mask.shape)} is not the prompt's {(batch, length)}; give one to every token (in "
            "labels -100 for none), and leave logits_to_keep at 0 with labels"
        )
    return mask


def _reduced(values: Tensor, packing: Packing | None, reduce: str) -> Tensor:
    """Reduce int64 ``values`` [B, N] over the slots of each prompt, by "sum", "amax" or "amin": [P]."""
    if packing is None:
        return getattr(values, reduce)(1)
    start = torch.full((len(packing.rows),), 0 if reduce == "sum" else -1 if reduce == "amax" else 1 << 60)
    start = start.to(values.device, non_blocking=True)
    index, values = packing.number.flatten(), values.flatten()
    return start.scatter_add(0, index, values) if reduce == "sum" else start.scatter_reduce(0, index, values, reduce)


def _packing(starts: Tensor | None) -> Packing | None:
    """Number the prompts; None where every row is a prompt. Padding belongs to the prompt before, or the first."""
    if starts is None:
        return None
    number = (starts.cumsum(1) - 1).clamp(min=0)
    counts = (number[:, -1] + 1).tolist()
    if max(counts) == 1:
        return None
    rows = tuple(row for row, count in enumerate(counts) for _ in range(count))
    first = [sum(counts[:row]) for row in range(len(counts))]
    return Packing(number + on_device(first, number.device)[:, None], rows, on_device(rows, number.device))


def _ends(
    call: Call, packing: Packing | None, last_visual: Tensor, slots: Tensor, starts: Tensor | None
) -> tuple[Tensor, str]:
    """Find the end of each prompt, the first slot [P] after it, and the name of what tells the end."""
    told, length = call.told, call.shape[1]
    prompts = len(last_visual)
    if told.prompt_length is not None:
        ends = torch.as_tensor(told.prompt_length).to(slots.device).expand(prompts) - call.past
        if packing is not None and starts is not None:
            ends = ends + _reduced(torch.where(starts, slots, length), packing, "amin")
        return ends, "prompt_length"
    if told.labels is not None:
        labels = _checked(told.labels, "labels", *call.shape).to(slots.device)
        after = last_visual[:, None] if packing is None else last_visual[packing.number]
        answers = (labels != -100) & (slots + told.shifted >= after)
        return _reduced(torch.where(answers, slots + told.shifted, length), packing, "amin"), "labels"
    if call.generates is not None:
        return torch.full((prompts,), call.generates - call.past, device=slots.device), "the prompt of generate()"
    return torch.full((prompts,), length, device=slots.device), "the forward pass"


def begin(
    call: Call | None, embeddings: Tensor, inputs: Mapping[str, Any], ids: VisualIds | None = None
) -> ForwardPass:
    """Make the state in which a forward pass over ``call`` reaches the decoder.

    ``embeddings`` [B, N, d] enter layer 0, ``inputs`` are the model's arguments; with ``ids`` images are numbered too.
    """
    if call is None:
        return ForwardPass(prunes=False, segments={0: Segment()})
    visual, valid = call.visual, call.valid
    if visual is None:
        valid = None if valid is None or bool(valid.all()) else valid
        return ForwardPass(prunes=False, length=call.shape[1], past=call.past, segments={0: Segment(valid=valid)})
    device = visual.device
    frames = ids.frame_starts(inputs) if ids is not None else None
    # the one host synchronisation of a prefill whose stages keep fixed counts
    visual, valid, starts, separate, frames = _download(visual, valid, call.starts, call.separate, frames)
    assert visual is not None
    facts = read_prompt(call, visual, valid, starts, separate, frames, ids is not None)
    visual, text, last, listed, columns, run, packing = _upload(device, *facts.tensors)
    return ForwardPass(
        prunes=True,
        length=visual.shape[1],
        past=call.past,
        uncached=call.uncached,
        settled=facts.settled,
        past_valid=call.past_valid,
        row_tokens=facts.row_tokens,
        columns=columns if packing is None else None,
        visual=listed,
        segments={0: Segment(valid=None if min(facts.row_tokens) == call.shape[1] else call.valid, packing=packing)},
        prompts=Prompts(
            embeddings, visual, text, last, listed, facts.num_text, facts.end_from, run, facts.image_sizes, inputs
        ),
    )


class PromptFacts(NamedTuple):
    """Facts of the prompts of a pass, on the host."""

    tensors: tuple[Any, ...]  # visual, text, last, listed, columns, run and packing, which go to the device
    num_text: tuple[int, ...]
    row_tokens: tuple[int, ...]
    settled: int
    end_from: str
    image_sizes: tuple[tuple[int, ...], ...]


def read_prompt(
    call: Call,
    visual: Tensor,
    valid: Tensor | None,
    starts: Tensor | None,
    separate: Tensor | None,
    frames: Tensor | None,
    numbers_images: bool,
) -> PromptFacts:
    """Find visual tokens, question and end of each prompt; all tensors are on the host."""
    packing = _packing(starts)
    real = torch.ones_like(visual) if valid is None else valid
    visual = visual & real
    slots = torch.arange(call.shape[1], device=visual.device).expand_as(visual)
    last_visual = _reduced(visual * (slots + 1), packing, "amax")
    ends, end_from = _ends(call, packing, last_visual, slots, starts)
    after, until = last_visual[:, None], ends[:, None]
    if packing is not None:
        after, until = last_visual[packing.number], ends[packing.number]
    text = real & (slots >= after) & (slots < until)
    last = _reduced((real & (slots < until)) * (slots + 1), packing, "amax") - 1
    rank = visual.cumsum(1) - 1
    num_visual = tuple(_reduced(visual.long(), packing, "sum").tolist())
    num_text = tuple(_reduced(text.long(), packing, "sum").tolist())
    row_tokens = tuple(real.sum(1).tolist())
    if separate is not None and not bool(separate):
        raise ValueError(
            "attention_mask is 4-D and neither causal nor that of several prompts side by side: a stage could not tell "
            "which tokens belong to one prompt; give each prompt a row, or detach()"
        )
    if packing is not None:
        rank = rank - on_device(packing.before(num_visual), rank.device)[packing.number]
    columns = torch.where(visual, rank, -1)
    listed = visual_of(columns, num_visual, packing)
    run: Tensor | None = None
    sizes: tuple[tuple[int, ...], ...] = ()
    if numbers_images:
        begins = visual & ~pad(visual, (1, 0))[:, :-1]
        runs = (begins if frames is None else begins | (visual & frames)).cumsum(1)
        run = take(runs[..., None], listed.slots, packing)[..., 0]
        run = run - run[:, :1]
        sizes = tuple(tuple(row[:number].bincount().tolist()) for row, number in zip(run, num_visual, strict=True))
    tensors = visual, text, last.clamp(min=0), listed, columns, run, packing
    return PromptFacts(tensors, num_text, row_tokens, call.past + int(last_visual.max()), end_from, sizes)


@dataclass
class FixedPrompt:
    """Layout of a prompt that later forward passes take over: where images, padding and question are."""

    call: Call | None = None
    forward: ForwardPass | None = None

    def knows(self, tokens: Tensor | None) -> bool:
        """Tell whether a call with ``tokens`` [B, N, ...] is one of that prompt."""
        return self.call is not None and tokens is not None and tuple(tokens.shape[:2]) == tuple(self.call.shape)

    def keep(self, call: Call, forward: ForwardPass) -> None:
        """Note the state in which the first pass reached the decoder."""
        prompts = replace(forward.prompts, embeddings=torch.empty(0), inputs={})
        self.call, self.forward = call, replace(forward, prompts=prompts, segments=dict(forward.segments))

    def begin(self, embeddings: Tensor, inputs: Mapping[str, Any]) -> ForwardPass:
        """Make the state of another pass; numbers that stages have uploaded are shared."""
        assert self.forward is not None
        prompts = replace(self.forward.prompts, embeddings=embeddings, inputs=inputs)
        return replace(
            self.forward, prompts=prompts, segments={0: replace(self.forward.segments[0])}, sent={}, trace=[]
        )


def _download(*flags: Tensor | bool | None) -> list[Tensor | None]:
    """Copy bool tensors to the host, all at once; anything else becomes None."""
    parts = [part for part in flags if isinstance(part, Tensor)]
    whole = torch.cat([part.flatten() for part in parts]).cpu()
    pieces = iter(whole.split([part.numel() for part in parts]))
    return [next(pieces).view(part.shape) if isinstance(part, Tensor) else None for part in flags]


def _upload(device: torch.device, *values: Any) -> list[Any]:
    """Copy tensors, and those within Visual and Packing, to a device: one copy for each dtype."""
    parts: list[Tensor] = []
    for value in values:
        inner = vars(value).values() if isinstance(value, Visual | Packing) else [value]
        parts += [part for part in inner if isinstance(part, Tensor)]
    moved: dict[torch.dtype, Iterator[Tensor]] = {}
    for dtype in dict.fromkeys(part.dtype for part in parts):
        group = [part for part in parts if part.dtype == dtype]
        whole = torch.cat([part.flatten() for part in group]).to(device, non_blocking=True)
        moved[dtype] = iter(whole.split([part.numel() for part in group]))

    def on_device_of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(moved[value.dtype]).view(value.shape)
        if isinstance(value, Visual | Packing):
            return replace(value, **{name: on_device_of(part) for name, part in vars(value).items()})
        return value

    return [on_device_of(value) for value in values]
