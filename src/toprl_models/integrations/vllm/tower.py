"""Readings of vLLM's CLIP tower, for methods that choose by the attention inside the vision tower."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toprl_models.methods import _tower
from toprl_models.methods._layout import Layout
from toprl_models.methods._tower import Recorder


class TowerReader(_tower.TowerReader):
    """Reader of the class token's attention in vLLM's tower, which has one projection for queries, keys and values.

    vLLM builds the tower's layers up to the one whose output the projector gets, so that it is the last.
    """

    def __init__(self, model: Any) -> None:
        tower, projector = model.vision_tower.vision_model, model.multi_modal_projector
        layer, size = tower.encoder.layers[-1], tower.config.patch_size
        attention = layer.self_attn
        self._layout, self._whole = Layout(True, 1, False, 0, (size, size)), True
        self._projector = weakref.ref(projector)
        self._head_dim, self._scale = attention.head_dim, attention.scale
        self._recorder = recorder = Recorder(model)
        width = attention.num_heads * attention.head_dim

        def split(module: nn.Module, args: tuple, output: tuple[Tensor, Any]) -> None:
            recorder.record("queries", output[0][:, 0, :width].detach())
            recorder.record("keys", output[0][..., width : 2 * width].detach())

        recorder.handles.append(attention.qkv_proj.register_forward_hook(split))
        recorder.output_of(layer, "states")
        recorder.input_of(projector, "selected", lambda args, _: args[0])
        recorder.output_of(projector, "features", lambda features: features.flatten(0, -2))
        if hasattr(model, "_merge_image_patch_embeddings"):
            recorder.output_of(projector, "places", lambda _: [])
            recorder.output_of(projector, "packed", lambda _: [])
            _watch_packing(model, recorder)
        self.handles = recorder.handles

    def _of_tokens(self, seen: dict[str, Any]) -> tuple[Tensor, list[int]]:
        if "packed" in seen:
            pictures, places = seen["packed"], seen["places"]

            def pack(values: Sequence[Tensor]) -> list[Tensor]:
                pairs = zip(values, places, strict=True)
                return [each.flatten(0, 1)[at.clamp(min=0)] * (at >= 0)[:, None] for each, at in pairs]

            tiles = [count for count, _ in pictures]
            seen |= {"tiles": tiles, "pack": pack, "features": torch.cat([packed for _, packed in pictures])}
        query, key = (seen[name].float().unflatten(-1, (-1, self._head_dim)) for name in ("queries", "keys"))
        weights = (torch.einsum("thc,tphc->thp", query, key) * self._scale).softmax(-1)
        received, keys = weights.mean(1)[:, 1:], key.mean(2)[:, 1:]
        return torch.cat([received[..., None], keys], 2).flatten(0, 1), [keys.shape[1]] * len(keys)


def _watch_packing(model: Any, recorder: Recorder) -> None:
    """Record which patch each token of a picture comes from, by LLaVA-NeXT's own packing of tiles; -1 for newlines.

    Patches are packed by their number and by their number plus 1: what differs is no newline.
    """
    models_pack = model._merge_image_patch_embeddings

    def pack(image_size: Tensor, patch_embeddings: Tensor, *, strategy: str) -> Tensor:
        tiles, patches, width = patch_embeddings.shape
        numbers = torch.arange(tiles * patches, dtype=torch.float32, device=patch_embeddings.device)
        numbers = numbers.view(tiles, patches, 1).expand(-1, -1, width)
        here, later = (models_pack(image_size, values, strategy=strategy)[:, 0] for values in (numbers, numbers + 1))
        packed = models_pack(image_size, patch_embeddings, strategy=strategy)
        recorder.seen["places"].append(torch.where(later > here, here.long(), -1))
        recorder.seen["packed"].append((tiles, packed))
        return packed

    model._merge_image_patch_embeddings = pack
