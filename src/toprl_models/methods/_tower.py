"""Readings of the vision tower for pruning methods, recorded by module hooks for the forward pass that needs them.

``generate()`` of recent transformers encodes the pictures before the model's forward pass and hands over features only.
So nothing can be read from the model's arguments, and the tower's own modules are watched.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toprl_models.families import Family, family_of
from toprl_models.policy import Policy, StageContext

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    from toprl_models.schedule import Schedule

# Added to the scores of what is kept: more than any attention
KEPT = 2.0


def after_first_layers(family: Family) -> str:
    """Say why tokens of a family cannot be chosen before layer 0; "" where they can."""
    return "its first stage cannot lie before layer 0" if family.min_stage else ""


def no_class_token(family: Family) -> str:
    """Say why the class token of a family's tower says nothing about its visual tokens; "" where it does."""
    return family.no_class_token or no_image_tower(family)


def no_choice_by_class_token(family: Family) -> str:
    """Say why a class token cannot choose tokens of a family before layer 0; "" where it can."""
    return after_first_layers(family) or no_class_token(family)


def no_image_tower(family: Family) -> str:
    """Say that a family's row names no vision tower; "" where it does."""
    return "" if family.image_tower else f"the row of {family.model_class} names no image_tower"


def check_before_llm(policy: Policy, schedule: Schedule) -> None:
    """Refuse any schedule but one stage before layer 0."""
    if schedule.layers != (0,):
        raise ValueError(
            f"schedule: stages before layers {schedule.layers}, but {type(policy).__name__} chooses tokens before the "
            "language model: use one stage at layer 0, Schedule(((0, keep),))"
        )


def refuse_videos(policy: Policy, inputs: Mapping[str, Any]) -> None:
    """Refuse model ``inputs`` with videos."""
    encoded = inputs.get("mm_encoder_outputs") or {}
    if inputs.get("pixel_values_videos") is not None or encoded.get("video") is not None:
        raise ValueError(
            f"pixel_values_videos: {type(policy).__name__} is defined for images, not for videos; give the frames as "
            "images, or prune this prompt by another method"
        )


def tile_shares(budget: int, capacities: Sequence[int]) -> list[int]:
    """Divide ``budget`` tokens among tiles, as evenly as their ``capacities`` allow.

    A tile with fewer tokens than an even share keeps all, and the others share what that tile lacks; the last of the
    largest tiles get one more each where the budget does not divide. The sum is ``min(budget, sum(capacities))``.

    Example:
        >>> tile_shares(10, [5, 1, 9])
        [4, 1, 5]
    """
    shares, left = [0] * len(capacities), budget
    smallest_first = sorted(range(len(capacities)), key=capacities.__getitem__)
    for number, tile in enumerate(smallest_first):
        shares[tile] = min(capacities[tile], left // (len(capacities) - number))
        left -= shares[tile]
    return shares


def split_rows(lengths: Sequence[int], num_visual: Sequence[int]) -> tuple[int, list[range]]:
    """Find the pictures of each row of the batch, whose features fill the visual slots in order.

    Args:
        lengths: visual tokens of each encoded picture.
        num_visual: visual tokens of each row.

    Returns:
        The number of rows of each prompt (``num_return_sequences`` and beams repeat rows, not pictures), and the
        numbers of each prompt's pictures.

    Raises:
        ValueError: the pictures do not fill the rows exactly.
    """
    total, wanted = sum(lengths), sum(num_visual)
    repeats = wanted // total if total else 0
    if repeats and len(num_visual) % repeats == 0:
        rows, start = [], 0
        for count in num_visual[::repeats]:
            stop, left = start, count
            while left > 0 and stop < len(lengths):
                left -= lengths[stop]
                stop += 1
            if left:
                break
            rows.append(range(start, stop))
            start = stop
        repeated = [count for count in num_visual[::repeats] for _ in range(repeats)]
        if len(rows) * repeats == len(num_visual) and start == len(lengths) and repeated == list(num_visual):
            return repeats, rows
    raise ValueError(
        f"the vision tower made {total} visual tokens, but the prompt has {tuple(num_visual)}; this method needs "
        "its states of exactly the pictures in this forward pass. Pass pixel_values (or let generate() encode them "
        "right before), no placeholders under padding, and prefill_chunk_size=None"
    )


def check_features(context: StageContext, repeats: int, features: Tensor, known: Tensor | None = None) -> None:
    """Refuse recorded states of other pictures than the prompt's, whose features are not in the prompt.

    ``features`` [S, d] are what the recorded states became, in the order of the visual slots of every ``repeats``-th
    row; bool ``known`` [S] marks those to compare, None for all.
    """
    prompt = context.hidden_states[::repeats][context.valid_mask[::repeats]]
    same = (features.to(prompt.dtype) == prompt).all(-1)
    if not bool((same if known is None else same | ~known).all()):
        raise ValueError(
            "the visual tokens of the prompt are not what the vision tower made last: encode the pictures in the same "
            "call (pixel_values), not ahead of time"
        )


class Recorder:
    """Store of tensors that modules of a model make, by name, until the base model's forward pass ends."""

    def __init__(self, base: nn.Module) -> None:
        self.seen: dict[str, Any] = {}
        self.handles: list[Any] = [base.register_forward_hook(self._end, always_call=True)]

    def record(self, name: str, value: object) -> None:
        self.seen[name] = value

    def output_of(self, module: nn.Module, name: str, pick: Callable = lambda output: output) -> None:
        """Record what ``module`` returns."""
        self.handles.append(module.register_forward_hook(lambda _, args, output: self.record(name, pick(output))))

    def input_of(self, module: nn.Module, name: str, pick: Callable[[tuple, dict[str, Any]], object]) -> None:
        """Record what ``pick`` takes of the arguments of ``module``."""
        hook = module.register_forward_pre_hook
        self.handles.append(hook(lambda _, args, kwargs: self.record(name, pick(args, kwargs)), with_kwargs=True))

    def take(self) -> dict[str, Any]:
        """Return what was recorded, and forget it.

        Raises:
            ValueError: nothing was recorded.
        """
        seen, self.seen = self.seen, {}
        if not seen:
            raise ValueError(
                "the vision tower did not run for this forward pass: pass pixel_values (or let generate() encode them "
                "right before) instead of features, and prefill_chunk_size=None"
            )
        return seen

    def _end(self, module: nn.Module, args: tuple, output: object) -> None:
        self.seen = {}


class PackingWatch:
    """Recorder of the patch that each token of LLaVA-NeXT comes from, by the model's own packing of tiles.

    ``pack_image_features`` is a method, which no module hook sees, and in ``generate()`` nothing else gets the sizes of
    the pictures. This method of one instance is watched until ``remove()``; its results pass through untouched.
    """

    def __init__(self, base: PreTrainedModel, recorder: Recorder) -> None:
        self._base, models_pack = weakref.ref(base), base.pack_image_features

        @functools.wraps(models_pack)
        def pack(
            image_features: Sequence[Tensor],
            image_sizes: object,
            vision_feature_select_strategy: str,
            image_newline: Tensor | None = None,
        ) -> object:
            index, tiles = [], 0
            for features in image_features:  # [tiles, P, d]
                count, patches = features.shape[:2]
                numbers = torch.arange(tiles * patches, (tiles + count) * patches, device=features.device)
                index.append(numbers.float().view(count, patches, 1))
                tiles += count
            newline = None if image_newline is None else index[0].new_full((1,), -1)
            packed, _ = models_pack(index, image_sizes, vision_feature_select_strategy, newline)
            recorder.record("slot_patch", [picture[:, 0].long() for picture in packed])
            return models_pack(image_features, image_sizes, vision_feature_select_strategy, image_newline)

        base.pack_image_features = pack

    def remove(self) -> None:
        if (base := self._base()) is not None:
            vars(base).pop("pack_image_features", None)


@dataclass(frozen=True)
class TileReading:
    """A class-token tower's results for the pictures of a batch of prompts.

    Shapes: T tiles (pictures, where these are not cut into tiles), P patches a tile, H heads, B rows, V visual slots.

    Attributes:
        attention: float32 ``[T, H, P]``: the class token's attention to the patches, softmax over all P + 1 tokens.
        keys: ``[T, P, H, head_dim]``, the patches' keys as ``k_proj`` returns them.
        states: ``[T, P + 1, d]``, the tower's features before the projector, class token first.
        slot_patch: int64 ``[B, V]``: ``tile * P + patch`` of each visual slot; -1 for newlines and padding.
        patch_slot: int64 ``[T, P]``: ``row * V + slot`` of each patch; -1 where unpadding left it out.
        capacities: patches of each tile that have a slot.
        tiles: numbers of the tiles of each row.
        repeats: each row stands for so many of the batch (``num_return_sequences``, beams); B counts it once.
    """

    attention: Tensor
    keys: Tensor
    states: Tensor
    slot_patch: Tensor
    patch_slot: Tensor
    capacities: tuple[int, ...]
    tiles: tuple[range, ...]
    repeats: int

    def shares(self, num_keep: Sequence[int]) -> list[int]:
        """Divide the ``num_keep`` tokens of each row among the row's tiles, by ``tile_shares``."""
        shares: list[int] = []
        for keep, tiles in zip(num_keep[:: self.repeats], self.tiles, strict=True):
            shares += tile_shares(keep, [self.capacities[tile] for tile in tiles])
        return shares

    def of_slots(self, values: Tensor, missing: float) -> Tensor:
        """Pick ``values`` of patches, ``[T, P]``, for visual slots ``[B, V]``; ``missing`` where there is none."""
        return values.flatten()[self.slot_patch.clamp(min=0)].masked_fill(self.slot_patch < 0, missing)


def class_token_layer(model: PreTrainedModel) -> GradientCheckpointingLayer:
    """Find the layer of the vision tower whose output the projector gets, class token included.

    The config's ``vision_feature_layer`` selects it: -2 in the released LLaVAs, and in the code of VisionZip's and
    FasterVLM's authors.

    Raises:
        ValueError: the tower has no class token, patches are merged into tokens, the class token is a visual token, or
            several layers are selected.
    """
    family, config = family_of(model), model.config
    tower: PreTrainedModel = getattr(model.base_model, family.image_tower or "_", None)
    reason = no_class_token(family)
    if not reason and not hasattr(getattr(tower, "embeddings", None), "class_embedding"):
        reason = f"the vision tower ({type(tower).__name__}) has no class token"
    if reason:
        raise ValueError(f"model: this method needs the attention of the vision tower's class token, but {reason}")
    strategy = getattr(config, "vision_feature_select_strategy", None)
    if strategy != "default" or not hasattr(model.base_model, "multi_modal_projector"):
        raise ValueError(
            f'model: config.vision_feature_select_strategy={strategy!r} must be "default", so that the class '
            "token is no visual token itself, and the model must have a multi_modal_projector"
        )
    selected, layers = getattr(config, "vision_feature_layer", None), tower.encoder.layers
    if isinstance(selected, int):
        # hidden_states[0] of the tower are the embeddings, hidden_states[i + 1] is the output of layer i
        index = selected + len(layers) if selected < 0 else selected - 1
        if 0 <= index < len(layers):
            attention = getattr(layers[index], "self_attn", None)
            missing = [name for name in ("q_proj", "k_proj", "head_dim", "scale") if not hasattr(attention, name)]
            if missing:
                raise ValueError(f"model: the vision tower's {type(attention).__name__} has no {', '.join(missing)}")
            return layers[index]
    raise ValueError(
        f"model: config.vision_feature_layer={selected!r} must be one of the vision tower's {len(layers)} layers"
    )


class ClassTokenReader:
    """Reader of the class token's attention, keys and features in the tower of one attached model.

    The queries and keys are what ``q_proj`` and ``k_proj`` returned in the tower's own forward pass, so any attention
    backend of the tower stays usable and no attention matrix is made; nothing is computed twice.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layer, base = class_token_layer(model), model.base_model
        # a detached policy must not keep the model alive
        self._projector = weakref.ref(base.multi_modal_projector)
        self._head_dim, self._scale = layer.self_attn.head_dim, layer.self_attn.scale
        self._recorder = recorder = Recorder(base)
        recorder.output_of(layer.self_attn.q_proj, "queries", lambda queries: queries[:, 0].detach())
        recorder.output_of(layer.self_attn.k_proj, "keys", Tensor.detach)
        recorder.output_of(layer, "states")
        recorder.input_of(base.multi_modal_projector, "selected", lambda args, _: args[0])
        recorder.output_of(base.multi_modal_projector, "features")
        if hasattr(base, "pack_image_features"):
            recorder.handles.append(PackingWatch(base, recorder))
        self.handles: list[RemovableHandle] = recorder.handles

    def project(self, states: Tensor) -> Tensor:
        """Apply the model's projector to tower states ``[..., d]``."""
        projector = self._projector()
        assert projector is not None
        return projector(states)

    def read(self, policy: Policy, context: StageContext) -> TileReading:
        """Return what the tower computed for the prompt of ``context``, and forget it.

        Raises:
            ValueError: the prompt has videos, or its visual tokens are not what the tower made last.
        """
        refuse_videos(policy, context.inputs)
        seen = self._recorder.take()
        keys, states, features = seen["keys"], seen["states"], seen["features"]
        if not torch.equal(seen["selected"], states[:, 1:]):
            raise ValueError(
                "vision_feature_layer or vision_feature_select_strategy differs from the model's config: set it there"
            )
        num_tiles, num_patches = features.shape[:2]
        patches = torch.arange(num_tiles * num_patches, device=features.device).view(num_tiles, num_patches)
        slot_patch = seen.get("slot_patch", list(patches))
        repeats, images = split_rows([len(picture) for picture in slot_patch], context.num_visual)
        flat = torch.cat(slot_patch)
        check_features(context, repeats, features.flatten(0, 1)[flat.clamp(min=0)], flat >= 0)
        valid = context.valid_mask[::repeats]
        slots = flat.new_full(valid.shape, -1)
        slots[valid] = flat
        places = (slots.flatten() >= 0).nonzero()[:, 0]
        patch_slot = torch.full_like(patches, -1)
        patch_slot.view(-1)[slots.flatten()[places]] = places
        # the first slot of a picture is the first patch of its first tile
        starts = [*(torch.stack([picture[0] for picture in slot_patch]) // num_patches).tolist(), num_tiles]
        query, key = (tensor.unflatten(-1, (-1, self._head_dim)) for tensor in (seen["queries"], keys))
        attention = torch.einsum("thc,tphc->thp", query.float(), key.float()) * self._scale
        return TileReading(
            attention=attention.softmax(-1)[..., 1:],
            keys=key[:, 1:],
            states=states,
            slot_patch=slots,
            patch_slot=patch_slot,
            capacities=tuple((patch_slot >= 0).sum(1).tolist()),
            tiles=tuple(range(starts[row.start], starts[row.stop]) for row in images),
            repeats=repeats,
        )


class ClassTokenPolicy(Policy):
    """Base of methods that choose visual tokens before layer 0 by the attention of the vision tower's class token.

    One instance serves one attached model at a time.

    Raises:
        ValueError: by ``attach``, for another schedule than one stage at layer 0, or a model without a class token; in
            the forward pass, for videos and for pictures that were encoded ahead of time.
    """

    positions = "renumbered"
    uses_text = False

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        check_before_llm(self, schedule)
        class_token_layer(model)

    def hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        self._reader = ClassTokenReader(model)
        return self._reader.handles
