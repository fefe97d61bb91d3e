"""Readings of the vision tower for pruning methods, recorded by module hooks for the forward pass that needs them.

``generate()`` of recent transformers encodes the pictures before the model's forward pass and hands over features only.
So nothing can be read from the model's arguments, and the tower's own modules are watched.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toprl_models.families import Family
from toprl_models.methods._layout import image_tower, layout_of, projector_of, read_layer
from toprl_models.policy import Policy, StageContext
from toprl_models.runtime.scores import Observation, Watched, attention_of, visible_rows

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule

# Added to the scores of what is kept: more than any attention
KEPT = 2.0
# Attention weights that are in memory at a time: 256 MiB of float32
WEIGHTS_AT_ONCE = 2**26


def after_first_layers(family: Family) -> str:
    """Say why tokens of a family cannot be chosen before layer 0; "" where they can."""
    return "its first stage cannot lie before layer 0" if family.min_stage else ""


def check_before_llm(policy: Policy, schedule: Schedule) -> None:
    """Refuse any schedule but one stage before layer 0."""
    if schedule.layers != (0,):
        raise ValueError(
            f"schedule: stages before layers {schedule.layers}, but {type(policy).__name__} chooses tokens before the "
            "language model: use one stage at layer 0, Schedule(((0, keep),))"
        )


def check_merging(policy: Policy, schedule: Schedule) -> None:
    """Refuse shares of images for a policy that merges the tokens that it drops into those that it keeps."""
    if schedule.share == "image":
        raise ValueError(
            f"schedule: share='image', but {type(policy).__name__} merges tokens, and the tokens that images keep must "
            "be those it merged into; use share='row'"
        )


def refuse_videos(policy: Policy, inputs: Mapping[str, Any]) -> None:
    """Refuse model ``inputs`` with videos."""
    encoded = inputs.get("mm_encoder_outputs") or {}
    if inputs.get("pixel_values_videos") is not None or encoded.get("video") is not None:
        raise ValueError(
            f"pixel_values_videos: {type(policy).__name__} is defined for images, not for videos; give the frames as "
            "images, or prune this prompt by another method"
        )


def tile_shares(budget: int, capacities: Sequence[int], sizes: Sequence[int] | None = None) -> list[int]:
    """Divide ``budget`` tokens among tiles in proportion to their ``sizes`` (None: evenly), up to their ``capacities``.

    A tile with fewer tokens than its share keeps all, and the others share what that tile lacks; the last of the
    largest tiles get one more each where the budget does not divide. The sum is ``min(budget, sum(capacities))``.

    Example:
        >>> tile_shares(10, [5, 1, 9]), tile_shares(10, [4, 16], [4, 16])
        ([4, 1, 5], [2, 8])
    """
    sizes = [1] * len(capacities) if sizes is None else sizes
    shares, left, total = [0] * len(capacities), budget, sum(sizes)
    for tile in sorted(range(len(capacities)), key=lambda tile: capacities[tile] / sizes[tile]):
        shares[tile] = min(capacities[tile], left * sizes[tile] // total)
        left, total = left - shares[tile], total - sizes[tile]
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


def check_features(context: StageContext, repeats: int, features: Tensor) -> None:
    """Refuse recorded states of other pictures than the prompt's, whose features are not in the prompt.

    ``features`` [S, d] are what the recorded states became, in the order of the visual slots of every ``repeats``-th
    row.
    """
    prompt = context.hidden_states[::repeats][context.valid_mask[::repeats]]
    if not torch.equal(features.to(prompt.dtype), prompt):
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

    def output_of(
        self, module: nn.Module, name: str, pick: Callable = lambda output: output, after: nn.Module | None = None
    ) -> None:
        """Record what ``module`` returns; only the first time after each call of ``after``, if that is given."""

        def hook(_: nn.Module, args: tuple, output: Any) -> None:
            if after is None or name not in self.seen:
                self.record(name, pick(output))

        self.handles.append(module.register_forward_hook(hook))
        if after is not None:
            self.handles.append(after.register_forward_pre_hook(lambda *_: self.forget(name)))

    def forget(self, name: str) -> None:
        self.seen.pop(name, None)

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
    """Recorder of how a model packs the tiles of pictures into visual slots (LLaVA-NeXT, LLaVA-OneVision).

    ``pack_image_features`` is a method, which no module hook sees, and in ``generate()`` nothing else gets the sizes of
    the pictures. This method of one instance is watched until ``remove()``; its results pass through untouched.
    Recorded are ``tiles``, the number of tiles of each picture, ``packing``, the arguments, ``pack``, which packs other
    values ``[tiles, P, c]`` of the same pictures, with zeros for newlines, ``packed``, the features of each picture,
    and ``features``, of all.
    """

    def __init__(self, base: PreTrainedModel, recorder: Recorder) -> None:
        self._base, models_pack = weakref.ref(base), base.pack_image_features
        signature = inspect.signature(models_pack)

        @functools.wraps(models_pack)
        def pack(*args: Any, **kwargs: Any) -> object:
            arguments = signature.bind(*args, **kwargs).arguments

            def again(pictures: Sequence[Tensor]) -> list[Tensor]:
                has_newline = arguments.get("image_newline") is not None
                newline = pictures[0].new_zeros(pictures[0].shape[-1]) if has_newline else None
                return models_pack(**arguments | {"image_features": pictures, "image_newline": newline})[0]

            recorder.record("tiles", [len(picture) for picture in arguments["image_features"]])
            recorder.record("packing", arguments)
            recorder.record("pack", again)
            packed = models_pack(*args, **kwargs)
            recorder.record("packed", list(packed[0]))
            recorder.record("features", torch.cat(packed[0]))
            return packed

        base.pack_image_features = pack

    def remove(self) -> None:
        if (base := self._base()) is not None:
            vars(base).pop("pack_image_features", None)


class _Calls(Watched):
    """Stand-in for the config of an attention module that notes all calls: a tower may take picture by picture."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[Observation] = []
        super().__init__(module)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.pop("attention_mask", mask)  # Qwen names it
        output = super().__call__(query, key, value, mask, kwargs)
        assert self.seen is not None
        self.calls.append(self.seen)
        self._module.config = self  # type: ignore[assignment]
        return output


def watch_attention(module: nn.Module, recorder: Recorder, name: str = "calls") -> None:
    """Record as ``name`` what an attention module of a tower hands to its attention function."""
    watches: list[_Calls] = []

    def begin(module: nn.Module, args: tuple) -> None:
        watches.append(_Calls(module))

    def end(module: nn.Module, args: tuple, output: object) -> None:
        watch = watches.pop()
        watch.end()
        recorder.record(name, watch.calls)

    recorder.handles.append(module.register_forward_pre_hook(begin))
    recorder.handles.append(module.register_forward_hook(end, always_call=True))


def sequences(call: Observation) -> list[Observation]:
    """Split a call into its sequences, each with a mask that says what its tokens see."""
    bounds = call.arguments.get("cu_seq_lens_q")  # flash attention
    if bounds is None:
        spans = [slice(None)]
    else:
        spans = [slice(start, stop) for start, stop in itertools.pairwise(bounds.tolist())]
    sequences = []
    for span in spans:
        query, key, value = (tensor[:, :, span] for tensor in (call.query, call.key, call.value))
        mask = call.mask
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):  # all see all, or all that is no padding
            mask = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool) if mask is None else mask.bool()
            mask = mask[:, None, None].expand(-1, 1, query.shape[2], -1)
        sequences.append(replace(call, query=query, key=key, value=value, mask=mask))
    return sequences


def mean_attention(call: Observation, from_class_token: bool = False) -> Tensor:
    """Compute the attention that each token of a tower receives: float32 ``[B, L]``, mean over heads.

    The weights are the model's own in float32 (``Observation.weights``), of some query rows at a time.

    Args:
        call: an attention call of one sequence, with a mask.
        from_class_token: attention of the first token alone; else the mean over the tokens that see the key and are no
            padding themselves.
    """
    (batch, heads, length), device = call.query.shape[:3], call.query.device
    step = 1 if from_class_token else max(1, WEIGHTS_AT_ONCE // (batch * heads * length))
    received = torch.zeros(batch, length, device=device)
    number = torch.zeros_like(received)
    for start in range(0, 1 if from_class_token else length, step):
        queries = torch.arange(start, min(start + step, length), device=device).expand(batch, -1)
        visible = visible_rows(call.mask, queries, length, 0, None)
        counted = visible & visible.diagonal(start, 1, 2)[..., None]
        received += (call.weights(queries, 0) * counted).sum(1)
        number += counted.sum(1)
    return received / number.clamp(min=1)


def read_patches(calls: Sequence[Observation], has_class_token: bool) -> tuple[Tensor, Tensor]:
    """Return what the patches of all calls receive, float32 ``[N]``, and their keys, mean over heads, ``[N, D]``."""
    received, keys, first = [], [], int(has_class_token)
    for sequence in itertools.chain.from_iterable(map(sequences, calls)):
        received.append(mean_attention(sequence, has_class_token)[:, first:].flatten())
        keys.append(sequence.key.float().mean(1)[:, first:].flatten(0, 1))
    return torch.cat(received), torch.cat(keys)


@dataclass(frozen=True)
class TowerReading:
    """A vision tower's results for the pictures of a batch of prompts.

    Shapes: B rows, V visual slots, T tiles (pictures, where these are not cut into tiles), d states of the tower.

    Attributes:
        scores: float32 ``[B, V]``: attention of the class token to the patches of a visual token, or where the tower
            has none the attention that they receive from all patches; mean over heads and over the patches that become
            one token. -1 for newlines and padding.
        keys: float32 ``[B, V, head_dim]``, mean over heads and patches.
        tile: int64 ``[B, V]``, the tile of each slot; -1 for newlines and padding.
        sizes: tokens that the tower made of each tile.
        capacities: slots of each tile; fewer than ``sizes`` where unpadding left tokens out.
        tiles: numbers of the tiles of each row.
        repeats: each row stands for so many of the batch (``num_return_sequences``, beams); B counts it once.
        states: ``[B, V, d]``, what becomes the tokens, and ``class_states`` ``[T, d]``; None unless there is a class
            token and a patch is a token.
    """

    scores: Tensor
    keys: Tensor
    tile: Tensor
    sizes: tuple[int, ...]
    capacities: tuple[int, ...]
    tiles: tuple[range, ...]
    repeats: int
    states: Tensor | None = None
    class_states: Tensor | None = None

    def shares(self, num_keep: Sequence[int]) -> list[int]:
        """Divide the ``num_keep`` tokens of each row among the row's tiles, by ``tile_shares``."""
        shares: list[int] = []
        for keep, tiles in zip(num_keep[:: self.repeats], self.tiles, strict=True):
            part = slice(tiles.start, tiles.stop)
            shares += tile_shares(keep, self.capacities[part], self.sizes[part])
        return shares

    def slots_of_tiles(self) -> tuple[Tensor, ...]:
        """Return the slots of each tile, ``row * V + slot``, in raster order."""
        order = self.tile.flatten().argsort(stable=True)
        return order[len(order) - sum(self.capacities) :].split(self.capacities)


class TowerReader:
    """Reader of attention, keys and features in the vision tower of one attached model.

    Queries and keys are those that the tower's own forward pass hands to its attention function, so any attention
    backend of the tower stays usable; nothing is computed twice but the attention weights of one layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        base, tower, self._layout = model.base_model, image_tower(model), layout_of(model)
        layer, projector = read_layer(model.config, tower), projector_of(model)
        self._whole = self._layout.has_class_token and self._layout.merge == 1
        # a detached policy must not keep the model alive
        self._projector = None if projector is None else weakref.ref(projector)
        self._recorder = recorder = Recorder(base)
        signature = inspect.signature(tower.forward)

        def sizes(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
            arguments = signature.bind(*args, **kwargs).arguments
            known = {name: arguments.get(name) for name in ("grid_thw", "image_sizes")}
            pixels = arguments.get("pixel_values")
            return known | {"pixel_values": None if pixels is None else pixels.shape}

        recorder.input_of(tower, "sizes", sizes)
        watch_attention(attention_of(layer), recorder)
        if projector is None:
            recorder.output_of(tower, "features", lambda output: output.pooler_output)
        else:
            recorder.input_of(projector, "selected", lambda args, kwargs: (args or tuple(kwargs.values()))[0])
            # Ovis2's makes the marks around an image, too
            recorder.output_of(projector, "features", lambda features: features.flatten(0, -2), after=tower)
        if self._layout.window:
            recorder.output_of(tower.merger, "merged")
        if self._layout.merge == 1 and projector is not None and hasattr(model.config, "vision_feature_layer"):
            recorder.output_of(layer, "states", lambda output: output[0] if isinstance(output, tuple) else output)
        if hasattr(base, "pack_image_features"):
            recorder.handles.append(PackingWatch(base, recorder))
        self.handles: list[RemovableHandle] = recorder.handles

    def project(self, states: Tensor) -> Tensor:
        """Apply the model's projector to tower states ``[..., d]``."""
        projector = None if self._projector is None else self._projector()
        assert projector is not None
        return projector(states)

    def read(self, policy: Policy, context: StageContext) -> TowerReading:
        """Return what the tower computed for the prompt of ``context``, and forget it.

        Raises:
            ValueError: the prompt has videos, or its visual tokens are not what the tower made last.
        """
        refuse_videos(policy, context.inputs)
        seen = self._recorder.take()
        values, sizes = self._of_tokens(seen)
        width, states = values.shape[1], seen.get("states")
        if states is not None:
            selected = states[:, int(self._layout.has_class_token) :]
            if not torch.equal(seen["selected"].flatten(0, -2), selected.flatten(0, -2)):
                raise ValueError(
                    "vision_feature_layer or vision_feature_select_strategy differs from the model's config: set it "
                    "there"
                )
            if self._whole:
                values = torch.cat([values, selected.flatten(0, -2)], 1)
        pictures, tile, counts = _packed(values, sizes, seen)
        repeats, rows = split_rows([len(picture) for picture in pictures], context.num_visual)
        check_features(context, repeats, seen["features"])
        valid = context.valid_mask[::repeats]
        values = torch.cat(pictures)
        slots = values.new_zeros(*valid.shape, values.shape[1])
        slots[valid] = values
        tiles = torch.full_like(valid, -1, dtype=torch.int64)
        tiles[valid] = tile
        starts = [0, *itertools.accumulate(counts)]
        return TowerReading(
            scores=slots[..., 0].masked_fill(tiles < 0, -1),
            keys=slots[..., 1:width],
            tile=tiles,
            sizes=tuple(sizes),
            capacities=tuple(tile[tile >= 0].bincount(minlength=len(sizes)).tolist()),
            tiles=tuple(range(starts[row.start], starts[row.stop]) for row in rows),
            repeats=repeats,
            states=None if states is None or not self._whole else slots[..., width:].to(states.dtype),
            class_states=None if states is None or not self._whole else states[:, 0],
        )

    def _of_tokens(self, seen: dict[str, Any]) -> tuple[Tensor, list[int]]:
        """Return attention and keys of the visual tokens, ``[N, 1 + D]``, and the tokens of each tile."""
        layout, features = self._layout, seen["features"]
        grids = layout.grids(seen["sizes"])
        received, keys = read_patches(seen["calls"], layout.has_class_token)
        sizes = [height * width // layout.merge**2 for height, width in grids]
        is_packed = "pack" in seen  # then features may be fewer, and newlines more
        if len(received) != sum(sizes) * layout.merge**2 or not (is_packed or len(features) == sum(sizes)):
            raise ValueError(
                f"model: {len(received)} patches and {len(features)} visual tokens of pictures with {grids} patches: "
                f"not {layout.merge} x {layout.merge} patches a token, so this method cannot tell which patches become "
                "which token"
            )
        if layout.window and not torch.equal(seen["merged"][layout.order(grids).argsort()], features):
            raise ValueError("model: the vision tower orders its windows in another way than Qwen2.5-VL's")
        return layout.merged(torch.cat([received[:, None], keys], 1), grids), sizes


def _packed(values: Tensor, sizes: Sequence[int], seen: Mapping[str, Any]) -> tuple[list[Tensor], Tensor, list[int]]:
    """Pack ``values`` ``[N, c]`` of visual tokens as the model packs its features.

    Returns:
        The values of each picture, ``[slots, c]``; int64, the tile of each slot, -1 for newlines; the number of tiles
        of each picture.
    """
    if "pack" not in seen:
        tile = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(values.device)
        return list(values.split(list(sizes))), tile, [1] * len(sizes)
    counts: list[int] = seen["tiles"]
    # where packing interpolates, a slot belongs to the tile that it has most of
    marks = torch.eye(max(counts), device=values.device)
    tiles, start, pictures = values.unflatten(0, (len(sizes), -1)), 0, []
    for count in counts:
        mark = marks[:count, None].expand(-1, tiles.shape[1], -1)
        pictures.append(torch.cat([tiles[start : start + count], mark], 2))
        start += count
    packed, numbers, start = seen["pack"](pictures), [], 0
    for picture, count in zip(packed, counts, strict=True):
        most, number = picture[:, values.shape[1] :].max(1)
        numbers.append(torch.where(most > 0, number + start, -1))
        start += count
    return [picture[:, : values.shape[1]] for picture in packed], torch.cat(numbers), counts


class TowerPolicy(Policy):
    """Base of methods that choose visual tokens before layer 0 by the attention inside the vision tower.

    The score of a patch is the class token's attention to it; where the tower has none (SigLIP, Qwen, Pixtral), the
    attention that it receives from all patches of its picture. The patches that a model merges into one visual token
    (Qwen, InternVL, Idefics 3, Mistral 3) have their mean.

    One instance serves one attached model at a time.

    Raises:
        ValueError: by ``attach``, for another schedule than one stage at layer 0, or a model whose tower cannot be
            read; in the forward pass, for videos and for pictures that were encoded ahead of time.
    """

    positions = "renumbered"
    uses_text = False

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        check_before_llm(self, schedule)
        check_tower(model)

    def hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        self._reader = TowerReader(model)
        return self._reader.handles


def check_tower(model: PreTrainedModel) -> None:
    """Refuse a model whose vision tower cannot be read.

    Raises:
        ValueError: the message says why.
    """
    layout_of(model)
    read_layer(model.config, image_tower(model))
    projector_of(model)
