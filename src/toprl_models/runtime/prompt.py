"""Reading what a model is called with: which tokens are visual, which are real, which are a draft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toprl_models.families import Family, video_token_ids, visual_token_ids
from toprl_models.runtime.scores import padding_of
from toprl_models.runtime.stage import Entry, ForwardPass, Visual, last_slots, on_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class VisualIds:
    """Placeholder ids by the kind of input that fills them."""

    images: tuple[int, ...]
    videos: tuple[int, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, family: Family) -> VisualIds:
        videos = video_token_ids(model, family)
        return cls(tuple(one for one in visual_token_ids(model, family) if one not in videos), videos)

    def brought(self, kwargs: dict[str, Any]) -> tuple[int, ...]:
        """Ids of the kinds of input that came along: a *generated* token may carry the id of an image or a video."""
        encoded = kwargs.get("mm_encoder_outputs") or {}
        names = [name for name, value in kwargs.items() if name.startswith("pixel_values") and value is not None]
        names += [name for name, value in encoded.items() if value is not None]
        videos = sum("video" in name for name in names)
        return (self.images if len(names) > videos else ()) + (self.videos if videos else ())


@dataclass
class Prompt:
    """What the model was called with, as far as pruning is concerned; B samples, N tokens of this pass."""

    visual: Tensor | None = None  # bool [B, N], None when no images came along
    valid: Tensor | None = None  # bool [B, N], None when all tokens are real
    past: int = 0  # tokens in the cache
    past_valid: Tensor | None = None  # bool [B, past], None when all of them are real
    drafted: int = 0  # last tokens that are a draft to be checked, not the prompt


def drafted_tokens(kwargs: dict[str, Any]) -> int:
    """How many last tokens of this call of the model are a draft: assisted decoding checks one along with the prompt.

    No policy may take the end of a draft for the question. Only ``logits_to_keep`` tells, together with a cache: a
    forward pass that merely saves logits brings none.
    """
    keep = kwargs.get("logits_to_keep")
    return max(keep - 1, 0) if isinstance(keep, int) and kwargs.get("past_key_values") is not None else 0


def find_placeholders(ids: tuple[int, ...], tokens: Tensor, embed: nn.Module) -> Tensor:
    """bool [B, N]: where ``tokens``, ids [B, N] or embeddings [B, N, d], stand for visual tokens.

    Among embeddings the models look for that of the id, and so must this.
    """
    wanted = on_device(ids, tokens.device)
    if tokens.ndim == 2:
        return torch.isin(tokens, wanted)
    return torch.stack([(tokens == one).all(-1) for one in embed(wanted)]).any(0)


def read_prompt(ids: VisualIds, args: tuple, kwargs: dict[str, Any], drafted: int, embed: nn.Module) -> Prompt | None:
    """The prompt in a call of the base model, whose token embedding is ``embed``; None for a decoding step."""
    brought = ids.brought(kwargs)
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None or (not brought and tokens.shape[1] == 1):
        return None
    batch, length = tokens.shape[:2]
    cache = kwargs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    mask = padding_of(kwargs.get("attention_mask"), past + length)
    valid = past_valid = None
    if mask is not None:
        mask = mask.expand(batch, -1)
        valid = mask[:, -length:]
        past_valid = mask[:, :past] if past and mask.shape[1] == past + length else None
    visual = find_placeholders(brought, tokens, embed) if brought else None
    return Prompt(visual, valid, past, past_valid, drafted)


def begin(prompt: Prompt | None, embeddings: Tensor, inputs: Mapping[str, Any]) -> ForwardPass:
    """The state in which a forward pass over ``prompt`` reaches the decoder.

    Args:
        embeddings: what enters layer 0, ``[B, N, d]``.
        inputs: what the model was called with.
    """
    if prompt is None:
        return ForwardPass(prunes=False)
    visual, valid = prompt.visual, prompt.valid
    if visual is None:
        return ForwardPass(prunes=False, valid=None if valid is None or bool(valid.all()) else valid)
    everything = torch.ones_like(visual) if valid is None else valid
    visual = visual & everything
    ordinal = torch.where(visual, visual.cumsum(1) - 1, -1)
    ends = visual.gather(1, last_slots(valid, visual, prompt.drafted)[:, None])[:, 0]
    slots = torch.arange(visual.shape[1], device=visual.device)
    last_visual = (visual * (slots + 1)).amax(1)
    behind = everything & (slots >= last_visual[:, None]) & (slots < visual.shape[1] - prompt.drafted)
    # the one host synchronisation of a prefill whose stages keep fixed counts
    counts = torch.stack([visual.sum(1), everything.sum(1), ends.long(), last_visual, behind.sum(1)]).tolist()
    num_visual, num_valid = tuple(counts[0]), tuple(counts[1])
    valid = None if min(num_valid) == visual.shape[1] else valid
    found = Visual.of(ordinal, num_visual)
    return ForwardPass(
        prunes=True,
        length=visual.shape[1],
        past=prompt.past,
        drafted=prompt.drafted,
        settled=prompt.past + max(counts[3]),
        ends_visual=tuple(bool(end) for end in counts[2]),
        past_valid=prompt.past_valid,
        ordinal=ordinal,
        visual=found,
        num_visual=num_visual,
        num_text=tuple(n - v for n, v in zip(num_valid, num_visual, strict=True)),
        valid=valid,
        entry=Entry(embeddings, found, visual, behind, max(counts[4]), inputs),
    )
