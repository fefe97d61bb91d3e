"""State of one forward pass through the decoder, and how tensors are picked by slot."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from toprl_kernels.stage.reference import score_difference

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from toprl_models.runtime.deepstack import DeepStack
    from toprl_models.runtime.mask import KeepArgument

AttentionMask: TypeAlias = "Tensor | BlockMask | None"  # as a layer gets it
Length: TypeAlias = int | Tensor  # a static cache counts its tokens on the device


@dataclass(frozen=True)
class StageTrace:
    """Record of a stage in the last prefill; P prompts (rows of the batch, or packed into its rows).

    Attributes:
        stage, layer: which stage, before which decoder layer.
        num_visual: original visual tokens per prompt.
        counts: tokens kept per prompt.
        indices: int64 ``[P, max(counts)]``, raster numbers of the kept tokens, ascending, -1 where a prompt has fewer.
        decided: the policy's scores ``[P, V]``, or its logits ``[P, V, 2]``.
        visual_index: int64 ``[P, V]``, the raster number of each column.
    """

    stage: int
    layer: int
    num_visual: tuple[int, ...]
    counts: tuple[int, ...]
    indices: Tensor
    decided: Tensor
    visual_index: Tensor

    @property
    def scores(self) -> Tensor:
        """Scores ``[P, V]``; computed when they are asked for."""
        return score_difference(self.decided)


@dataclass
class Visual:
    """Visual tokens of each prompt: ``slots`` [P, V] in the current sequence (0 where ``valid`` is False)."""

    slots: Tensor
    valid: Tensor
    index: Tensor  # int64 [P, V], raster number, -1 for padding
    counts: tuple[int, ...]


@dataclass
class Packing:
    """Several prompts in a row: ``number`` [B, n] of the prompt each slot belongs to, ``rows`` the row of each."""

    number: Tensor
    rows: tuple[int, ...]
    row_index: Tensor  # int64 [P], the same on the device

    def before(self, counts: Sequence[int]) -> list[int]:
        """Sum ``counts`` of the earlier prompts of the same row, for each prompt."""
        sums = [0, *accumulate(counts)]
        return [sums[prompt] - sums[self.rows.index(row)] for prompt, row in enumerate(self.rows)]


@dataclass
class Prompts:
    """The prompts of a forward pass as they enter layer 0: B rows, N slots, P prompts."""

    embeddings: Tensor  # [B, N, d]
    is_visual: Tensor  # bool [B, N]
    is_text: Tensor  # bool [B, N]: the question, after the prompt's last visual token and before its end
    last: Tensor  # int64 [P], slot of the last token of each prompt
    visual: Visual
    num_text: tuple[int, ...]  # question tokens of each prompt
    end_from: str  # what told the prompt's end, for messages
    run: Tensor | None  # int64 [P, V0], number of the image each visual token belongs to; None: not asked for
    image_sizes: tuple[tuple[int, ...], ...]  # visual tokens of each image of each prompt; empty: not asked for
    inputs: Mapping[str, Any]  # keyword arguments of the model


@dataclass
class Segment:
    """The sequence as the layers after one stage see it (segment 0: before all stages); m slots."""

    slots: Tensor | None = None  # int64 [B, m], the prompt's slot of each; None: all N
    valid: Tensor | None = None  # bool [B, m], False for padding; None: none is
    moved: Tensor | None = None  # int64 [B, m], by how much positions are smaller than the prompt's
    shift: Tensor | None = None  # int64 [B], by how much later positions are smaller
    packing: Packing | None = None
    earlier: Tensor | None = None  # int64 [B], the shift that earlier passes left; known when ``has_earlier``
    has_earlier: bool = False
    keep_mask: Tensor | None = None  # mask mode: [B, N]
    carried: dict[str, tuple[object, Any]] = field(default_factory=dict)  # (the model's argument, its survivors' rows)
    made: list[tuple[tuple[object, ...], dict[str, Any]]] = field(default_factory=list)

    def made_from(self, *sources: object) -> dict[str, Any] | None:
        """Return the arguments of a layer that were made from ``sources``, as objects; None: not yet."""
        for before, arguments in self.made:
            if all(old is new for old, new in zip(before, sources, strict=True)):
                return arguments
        return None


_UNPRUNED: Any = None  # what a pass that does not prune lacks, and never reads


@dataclass
class ForwardPass:
    """State of one forward pass; ``current`` is the segment that the next layer runs in."""

    prunes: bool
    length: int = 0  # tokens of this pass
    past: int = 0  # tokens of the sequence before this pass
    uncached: bool = False  # a pass of generate() without a cache
    settled: int = 0  # length of the sequence up to the last visual token of this pass
    past_valid: Tensor | None = None  # bool [B, past] of the tokens in the cache before this pass
    prompts: Prompts = _UNPRUNED
    row_tokens: tuple[int, ...] = ()  # tokens of each row in the current segment, padding excluded
    # int64 [B, n] of the current segment: the column of each token in ``visual``, -1 for text; None for packed rows
    columns: Tensor | None = None
    visual: Visual = _UNPRUNED  # of the current segment
    uploaded: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)  # host numbers that are on the device
    segments: dict[int, Segment] = field(default_factory=dict)
    current: int = 0
    sent: dict[int, KeepArgument] = field(default_factory=dict)  # mask mode: what each layer was given
    bounded_mask_grad: bool = False
    deepstack: DeepStack | None = None  # planes that are added after the first stage
    trace: list[StageTrace] = field(default_factory=list)

    @property
    def num_visual(self) -> tuple[int, ...]:
        return self.prompts.visual.counts if self.prunes else ()

    @property
    def segment(self) -> Segment:
        return self.segments[self.current]

    def numbers(self, counts: tuple[int, ...], device: torch.device) -> int | Tensor:
        """Return ``counts`` for an op: an int where they are alike, else a tensor, which is uploaded once."""
        if len(set(counts)) == 1:
            return counts[0]
        if counts not in self.uploaded:
            self.uploaded[counts] = on_device(counts, device)
        return self.uploaded[counts]

    def shares(self, counts: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the share of each image in ``counts``, int64 [P, images]; uploaded once."""
        key = ("shares", *counts)
        if key not in self.uploaded:
            rows = [image_shares(sizes, count) for sizes, count in zip(self.prompts.image_sizes, counts, strict=True)]
            width = max(map(len, rows))
            flat = [share for row in rows for share in row + [0] * (width - len(row))]
            self.uploaded[key] = on_device(flat, device).view(len(rows), width)
        return self.uploaded[key]

    def upload(self, stages: Sequence[tuple[int, ...]], device: torch.device) -> None:
        """Make what ``numbers`` will return for the counts of all stages, by one copy."""
        ragged = [counts for counts in stages if len(set(counts)) > 1]
        if ragged:
            table = on_device([count for counts in ragged for count in counts], device)
            self.uploaded |= dict(zip(ragged, table.view(len(ragged), -1), strict=True))

    def move(self, device: torch.device) -> None:
        """Move what a stage needs to the device of its layer, where a model is spread over several."""
        if self.visual.slots.device != device:
            self.columns, self.visual = _moved(self.columns, device), _moved(self.visual, device)
            self.uploaded = {}
            self.prompts = _moved(self.prompts, device)
            self.segments |= {0: _moved(self.segments[0], device), self.current: _moved(self.segment, device)}


def image_shares(sizes: Sequence[int], count: int) -> list[int]:
    """Share ``count`` kept tokens among images of these sizes, by Sainte-Lague's method.

    The next token goes to the image with the largest n / (2 s + 1), where it has n tokens and s of the count so far.
    The shares are proportional to the images' sizes, add up to the count, and never grow when it shrinks.
    """
    shares = [0] * len(sizes)
    queue = [(-float(size), image) for image, size in enumerate(sizes)]
    heapq.heapify(queue)
    for _ in range(min(count, sum(sizes))):
        _, image = queue[0]
        shares[image] += 1
        heapq.heapreplace(queue, (-sizes[image] / (2 * shares[image] + 1), image))
    return shares


def _moved(value: Any, device: torch.device) -> Any:
    """Return a copy of a tensor, or of a dataclass with its tensors, on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Visual | Packing | Prompts | Segment):
        kinds = (Tensor, Visual, Packing)
        moved = {item.name: getattr(value, item.name) for item in fields(value)}
        return replace(value, **{name: _moved(part, device) for name, part in moved.items() if isinstance(part, kinds)})
    return value


def gather_slots(tensor: Tensor, slots: Tensor) -> Tensor:
    """Gather rows of ``tensor`` [B or 1, N, d] at ``slots`` [B, m]: [B, m, d]."""
    tensor = tensor.expand(len(slots), -1, -1)
    slots = slots.to(tensor.device)
    return tensor.gather(1, slots[..., None].expand(-1, -1, tensor.shape[-1]))


def take(tensor: Tensor, slots: Tensor, packing: Packing | None) -> Tensor:
    """Pick states [B, n, d] at the slots [P, W] of each prompt: [P, W, d]."""
    if packing is None:
        return gather_slots(tensor, slots)
    return tensor[packing.row_index[:, None].to(tensor.device), slots.to(tensor.device)]


def put(base: Tensor, slots: Tensor, valid: Tensor, values: Tensor, packing: Packing | None) -> Tensor:
    """Return ``base`` [B, n, ...] with ``values`` [P, W, ...] at ``slots`` [P, W] where ``valid``."""
    batch, length = base.shape[:2]
    row = torch.arange(batch, device=slots.device) if packing is None else packing.row_index
    index = torch.where(valid, row[:, None] * length + slots, batch * length).flatten()
    flat = pad(base.reshape(batch * length, *base.shape[2:]), (0, 0) * (base.ndim - 2) + (0, 1))
    values = values.to(base.dtype).flatten(0, 1)
    index = index.reshape(-1, *[1] * (base.ndim - 2)).expand_as(values)
    return flat.scatter(0, index, values)[: batch * length].view(base.shape)


def listed(flags: Tensor, counts: Sequence[int], packing: Packing | None) -> tuple[Tensor, Tensor]:
    """List the slots [P, W] that bool ``flags`` [B, n] mark in each prompt, and which of them are real, bool [P, W].

    ``counts`` has the number of flagged slots of each prompt, on the host; W is the largest.
    """
    width, device = max(counts), flags.device
    rank = flags.cumsum(1) - 1
    if packing is None:
        number = torch.arange(len(counts), device=device)[:, None]
    else:
        number = packing.number
        rank = rank - on_device(packing.before(counts), device)[number]
    index = torch.where(flags, number * width + rank, len(counts) * width)
    slots = torch.zeros(len(counts) * width + 1, dtype=torch.int64, device=device)
    everything = torch.arange(flags.shape[1], device=device).expand_as(flags)
    slots = slots.scatter(0, index.flatten(), everything.flatten())[:-1].view(len(counts), width)
    valid = torch.arange(width, device=device) < on_device(counts, device)[:, None]
    return slots.masked_fill(~valid, 0), valid


def visual_of(ordinal: Tensor, counts: tuple[int, ...], packing: Packing | None) -> Visual:
    """List the visual tokens, where ``ordinal`` [B, n] is their raster number and -1 elsewhere."""
    slots, valid = listed(ordinal >= 0, counts, packing)
    index = take(ordinal[..., None], slots, packing)[..., 0]
    return Visual(slots, valid, index.masked_fill(~valid, -1), counts)


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Make an int64 tensor ``[n]``; the host does not wait for the device, as ``torch.tensor(..., device=)`` does."""
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
