"""Pruned variants of vLLM's classes, made from its own when they are asked for.

``ToprlQwen2_5_VLForConditionalGeneration`` prunes before the language model, ``ToprlInsideQwen2_5_VLFor...`` inside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.model_executor.models.registry import ModelRegistry
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, PlaceholderRange
from vllm.multimodal.processing import PromptUpdateDetails

from toprl_models.integrations.vllm.frontend import note
from toprl_models.integrations.vllm.inside import Staging
from toprl_models.integrations.vllm.options import ARCHITECTURES, INSIDE, KEY, PREFIX, PruningOptions
from toprl_models.integrations.vllm.pages import Counts
from toprl_models.integrations.vllm.placeholders import (
    AXES,
    DIGITS,
    Gap,
    from_columns,
    full_places,
    shorten,
    to_columns,
)
from toprl_models.integrations.vllm.pruning import ImagePruning

NUM_VISUAL = "toprl_num_visual"  # the full number of an image's tokens, beside its pixels


class ImagesInfo:
    """Mixin of the processing info: images alone."""

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        limits = super().get_supported_mm_limits()  # type: ignore[misc]
        return {kind: limit if kind == "image" else 0 for kind, limit in limits.items()}


class PrunedInfo(ImagesInfo):
    """Mixin of the processing info: images alone, and as many tokens as stay."""

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Any) -> dict[str, int] | None:
        most = super().get_mm_max_tokens_per_item(seq_len, mm_counts)  # type: ignore[misc]
        options = PruningOptions.stored_in(self.ctx.model_config.hf_config)  # type: ignore[attr-defined]
        return None if most is None else {"image": options.count(most["image"])}


class PrunedProcessor:
    """Mixin of the multimodal processor: fewer placeholders, and caches that know the method."""

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        updates = super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        options = PruningOptions.stored_in(self.info.ctx.model_config.hf_config)  # type: ignore[attr-defined]
        images = []
        for number, alternatives in enumerate(updates.get("image", ())):
            shortened = [_shortened(update, options) for update in alternatives]
            images.append([update for update, _ in shortened])
            (total,) = {total for _, total in shortened}
            field = MultiModalBatchedField(keep_on_cpu=True)
            out_mm_kwargs["image"][number][NUM_VISUAL] = MultiModalFieldElem(torch.tensor(total), field)
        return {**updates, "image": images} if images else updates

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().apply(*args, **kwargs)  # type: ignore[misc]
        note(inputs, kept_per_image=[place.get_num_embeds() for place in _images(inputs)])
        return inputs

    def _get_mm_hashes(self, inputs: Any) -> Any:
        digest = self.info.ctx.model_config.hf_config.toprl["digest"]  # type: ignore[attr-defined]
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        return {kind: [f"{each}-{KEY}-{digest}" for each in of_kind] for kind, of_kind in hashes.items()}


def _shortened(update: Any, options: PruningOptions) -> tuple[Any, int]:
    """Shorten the placeholders of a resolved update; return it with the full number of them."""
    full, mask = update.content.full, update.content.is_embed
    flags = [True] * len(full) if mask is None else mask(full).tolist()
    stays = shorten(flags, options.count(sum(flags)))
    kept = torch.tensor([flags[place] for place in stays])
    content = PromptUpdateDetails([full[place] for place in stays], None if mask is None else lambda _: kept)
    return replace(update, content=content), sum(flags)


class PrunedModel:
    """Mixin of the models: features of an image that do not stay never reach the scheduler or the decoder.

    Original positions (those of M-RoPE, and of policies that do not renumber) travel as columns of the features:
    vLLM's runner gives all tokens of an image the position of its first, and ``forward`` adds the rest, in place,
    because CUDA graphs read the runner's buffer.
    """

    supports_mrope = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        options = PruningOptions.stored_in(config)
        self._pruning = ImagePruning(options.prepare(config), options, config.get_text_config().hidden_size)
        self._pruning_ready = False
        self._dtype = vllm_config.model_config.dtype
        self._plain, self._original = config.toprl["plain"], config.toprl["original"]
        self._row_offsets: tuple[Tensor, Tensor] | None = None
        if self._original and vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL:
            raise ValueError(
                f"{KEY}: cudagraph_mode=FULL replays prefill without the positions of what stays; use "
                "FULL_AND_PIECEWISE or PIECEWISE"
            )

    def embed_multimodal(self, **kwargs: Any) -> Any:
        totals = kwargs.pop(NUM_VISUAL, None)
        if not self._pruning_ready:
            parameter = next(self.parameters())  # type: ignore[attr-defined]
            self._pruning.prepare(self, parameter.device, self._dtype)
            self._pruning_ready = True
        features = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if totals is None:
            return features
        if [len(each) for each in features] != [int(total) for total in totals]:
            raise RuntimeError(f"{KEY}: images have {[*map(len, features)]} features, but {totals} placeholders")
        chosen = self._pruning(list(features), kwargs)
        if not self._original:
            return [kept for kept, _ in chosen]
        return [
            torch.cat([kept, to_columns(self._offsets(number, index, kwargs), kept)], -1)
            for number, (kept, index) in enumerate(chosen)
        ]

    def _offsets(self, number: int, index: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Find how far tokens with these raster numbers are from the first one of image ``number``: [k, AXES]."""
        if self._plain:
            return index[:, None].expand(-1, AXES)
        columns = int(inputs["image_grid_thw"][number][2]) // self.config.vision_config.spatial_merge_size  # type: ignore[attr-defined]
        return torch.stack([torch.zeros_like(index), index // columns, index % columns], -1)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None, **kwargs: Any
    ) -> Tensor:
        if self._original and multimodal_embeddings is not None and len(multimodal_embeddings):
            width = AXES * DIGITS
            offsets = from_columns(torch.cat([each[:, -width:] for each in multimodal_embeddings]))
            multimodal_embeddings = [each[:, :-width] for each in multimodal_embeddings]
            self._row_offsets = is_multimodal, offsets
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal, **kwargs
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        waiting, self._row_offsets = self._row_offsets, None
        if waiting is not None:
            rows = waiting[0].nonzero()[:, 0].to(positions.device)
            positions.index_add_(1, rows, waiting[1].T.to(positions))
        if self._plain and self._original:
            positions = positions[0]
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Give the shortened prompt the positions of the full one, and all tokens of an image that of its first."""
        gaps, full_features, shift = [], [], 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            at, total = feature.mm_position, int(feature.data[NUM_VISUAL].data)
            flags = [True] * at.length if at.is_embed is None else at.is_embed.tolist()
            gaps.append(Gap(at.offset + flags.index(True), sum(flags), total))
            # its text may begin before its placeholders
            place = PlaceholderRange(offset=gaps[-1].start + shift, length=total)
            full_features.append(replace(feature, mm_position=place))
            shift += total - sum(flags)
        full_length = len(input_tokens) + shift
        if self._plain:
            positions, delta = torch.arange(full_length).expand(AXES, -1), 0
        else:
            places = full_places(len(input_tokens), gaps)
            full_tokens = [0] * full_length
            for place, token in zip(places, input_tokens, strict=True):
                full_tokens[place] = token
            positions, delta = super().get_mrope_input_positions(full_tokens, full_features)  # type: ignore[misc]
        places = full_places(len(input_tokens), gaps)
        return positions[:, places].clone(), full_length + delta - len(input_tokens)


class InsideProcessor:
    """Mixin of the multimodal processor: a prompt must ask something after its images."""

    _asks = True  # vLLM's own dummy prompts, which measure memory, end in their images

    @functools.cached_property
    def _counts(self) -> Counts:
        config = self.info.ctx.model_config.hf_config  # type: ignore[attr-defined]
        return Counts(PruningOptions.stored_in(config), config)

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        self._asks = False
        try:
            return super().get_dummy_mm_inputs(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._asks = True

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().apply(*args, **kwargs)  # type: ignore[misc]
        images = _images(inputs)
        # the last visual token, not the last placeholder: InternVL's go on with </img>, which is text
        last = max((place.extract_embeds_range()[-1][1] for place in images), default=-1)
        if self._asks and last == len(inputs["prompt_token_ids"]) - 1:
            raise ValueError(f"{KEY}: the prompt ends in an image; append the question, which the policy could read")
        visual = sum(place.get_num_embeds() for place in images)
        kept = [visual - dropped for dropped in self._counts.dropped(visual)]
        note(inputs, visual_tokens=visual, kept_per_stage=kept)
        return inputs


def _images(inputs: Any) -> list[PlaceholderRange]:
    return [place for of_kind in inputs["mm_placeholders"].values() for place in of_kind]


class InsideModel:
    """Mixin of the models: stages in the decoder."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.staging = Staging(self.language_model.model, vllm_config.model_config.hf_config)  # type: ignore[attr-defined]


def _mixed(mixin: type, factory: Callable[..., Any]) -> Callable[..., Any]:
    """Make a factory of objects with ``mixin`` from one of vLLM's, a class or a function that chooses a class."""

    def make(*args: Any) -> Any:
        cls = factory if isinstance(factory, type) else type(factory(*args))
        return type(f"Pruned{cls.__name__}", (mixin, cls), {})(*args)

    return make


def __getattr__(name: str) -> type:
    """Make the pruned variant of a class of vLLM's registry."""
    prefix = INSIDE if name.startswith(INSIDE) else PREFIX
    architecture = name.removeprefix(prefix)
    if architecture not in ARCHITECTURES or architecture == name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base: Any = ModelRegistry.models[architecture].load_model_cls()
    factories = base._processor_factory
    is_inside = prefix == INSIDE
    pruned = type(name, (InsideModel if is_inside else PrunedModel, base), {"__module__": __name__})
    globals()[name] = pruned
    return MULTIMODAL_REGISTRY.register_processor(
        _mixed(InsideProcessor if is_inside else PrunedProcessor, factories.processor),
        info=_mixed(ImagesInfo if is_inside else PrunedInfo, factories.info),
        dummy_inputs=factories.dummy_inputs,
    )(pruned)
