"""Model inputs of samples, with what the frozen vision tower makes of the images kept from iteration to iteration."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_outputs import ModelOutput

from training.tasks import Sample, Task, device_of, encode
from training.trainer.prefix import Prefix, prefix_of

MODALITIES = {"image": "get_image_features", "video": "get_video_features"}


@dataclass(frozen=True)
class Encoded:
    """One sample on the host: ``inputs`` without padding, pixels and batch mates; ``features`` by modality.

    ``prefix`` is what the layers before the first stage make of it, where that is kept.
    """

    inputs: dict[str, Any]
    features: dict[str, dict[str, Any]]
    prefix: Prefix | None = None

    @property
    def bytes(self) -> int:
        prefix = self.prefix.bytes if self.prefix else 0
        return prefix + sum(tensor.nbytes for tensor in _tensors([self.inputs, self.features]))


class FeatureCache:
    """What encoding gave for each sample, up to ``megabytes`` of host memory; 0 keeps nothing.

    Samples are encoded one at a time, so that the numbers do not depend on which others are in the batch or on what
    is kept already: a resumed run sees the bits that the uninterrupted one saw. Once it is full, further samples are
    encoded each time they come; nothing is thrown out, as samples are drawn at random and none is more likely next.

    Args:
        megabytes: of host memory.
        depth: decoder layers before the first stage. What they make of a sample is kept too, if there is room for that
            of every sample (``plan``).
    """

    def __init__(self, megabytes: float, depth: int = 0) -> None:
        self.free, self.depth = int(megabytes * 2**20), depth
        self.enabled = self.free > 0
        self._kept: dict[str, Encoded] = {}  # by key of the sample

    def __len__(self) -> int:
        return len(self._kept)

    def plan(self, model: Any, processor: Any, task: Task, samples: Sequence[Sample]) -> None:
        """Keep no prefixes if those of ``samples``, taken to be as large as the first one's, would not fit."""
        if self.depth and not (self.enabled and takes_features(model)):
            self.depth = 0
        if self.depth and self._make(model, processor, task, samples[0]).bytes * len(samples) > self.free:
            self.depth = 0

    def encoded(self, model: Any, processor: Any, task: Task, sample: Sample) -> Encoded:
        """What the model is called with for ``sample``."""
        if sample.key in self._kept:
            return self._kept[sample.key]
        one = self._make(model, processor, task, sample)
        if one.bytes <= self.free:
            self.free -= one.bytes
            self._kept[sample.key] = one
        return one

    def _make(self, model: Any, processor: Any, task: Task, sample: Sample) -> Encoded:
        device = device_of(model)
        one = encode_features(model, encode(processor, task, [sample], device))
        if not self.depth:
            return one
        return replace(one, prefix=prefix_of(model, collate([one], 0, device), self.depth))


def takes_features(model: Any) -> bool:
    """Whether ``model`` can be called with features instead of pixels (releases of transformers before 5.23 cannot)."""
    named = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    return named and hasattr(model.base_model, MODALITIES["image"])


@torch.no_grad()
def encode_features(model: Any, inputs: dict[str, Any]) -> Encoded:
    """Replace the pixels in ``inputs`` of one sample by what vision tower and projector make of them.

    The rest stays: places in an image (``image_grid_thw``, ``image_sizes``) are needed for position ids.

    Raises:
        ValueError: pixels that no encoder of the model takes.
    """
    rest, features = dict(inputs), {}
    if "pixel_values_images" in rest:  # Video-LLaVA's processor still gives it the name that the model has dropped
        rest["pixel_values"] = rest.pop("pixel_values_images")
    for modality, name in MODALITIES.items():
        if not hasattr(model.base_model, name):
            continue
        encoder = getattr(model.base_model, name)
        arguments = {key: rest[key] for key in inspect.signature(encoder).parameters if key in rest}
        pixels = [key for key in arguments if key.startswith("pixel_values")]
        if pixels:
            output = encoder(**arguments, return_dict=True)
            kept = ("pooler_output", "deepstack_features")
            features[modality] = {key: output[key] for key in kept if output.get(key) is not None}
            for key in pixels:
                del rest[key]
    left = [key for key in rest if key.startswith("pixel_values")]
    if left:
        raise ValueError(
            f"{type(model).__name__} has no encoder that takes {', '.join(left)}; use --feature_cache_mb 0"
        )
    return Encoded(_to(rest, "cpu"), _to(features, "cpu"))


def collate(encoded: Sequence[Encoded], pad_token_id: int, device: str | torch.device) -> dict[str, Any]:
    """The left-padded inputs of a batch, as ``encode`` gives them, with ``mm_encoder_outputs`` instead of pixels."""
    length = max(one.inputs["input_ids"].shape[1] for one in encoded)
    batch: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in encoded for name in one.inputs):
        values = [one.inputs[name] for one in encoded if name in one.inputs]
        per_token = len(values) == len(encoded) and all(
            isinstance(value, Tensor) and value.shape == one.inputs["input_ids"].shape
            for value, one in zip(values, encoded, strict=True)
        )
        if per_token:
            fill = pad_token_id if name == "input_ids" else 0
            values = [pad(value, (length - value.shape[1], 0), value=fill) for value in values]
        batch[name] = _concatenate(values)
    found = [modality for modality in MODALITIES if any(modality in one.features for one in encoded)]
    batch["mm_encoder_outputs"] = {
        modality: _output([one.features[modality] for one in encoded if modality in one.features]) for modality in found
    }
    return _to(batch, device)


def _output(parts: list[dict[str, Any]]) -> ModelOutput:
    """The encoder's output for all images of a batch."""
    joined = {"pooler_output": _concatenate([part["pooler_output"] for part in parts])}
    if "deepstack_features" in parts[0]:  # per layer, then as pooler_output
        layers = zip(*(part["deepstack_features"] for part in parts), strict=True)
        joined["deepstack_features"] = [_concatenate(list(layer)) for layer in layers]
    return ModelOutput(joined)


def _concatenate(values: list[Any]) -> Any:
    """Tensors along their first dimension, lists behind each other."""
    return torch.cat(values) if isinstance(values[0], Tensor) else [one for value in values for one in value]


def _to(value: Any, device: str | torch.device) -> Any:
    """``value`` with all tensors in it on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):  # ModelOutput too
        return type(value)({key: _to(one, device) for key, one in value.items()})
    return [_to(one, device) for one in value] if isinstance(value, list | tuple) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [tensor for one in value for tensor in _tensors(one)]
    return [value] if isinstance(value, Tensor) else []
