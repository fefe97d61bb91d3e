"""Readings of vLLM's CLIP tower, for methods that choose by its class token."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from toprl_models.methods._tower import ClassTokenReader, Recorder


class TowerReader(ClassTokenReader):
    """Reader of the class token's attention in vLLM's tower, which has one projection for queries, keys and values.

    vLLM builds the tower's layers up to the one whose output the projector gets, so that it is the last.
    """

    def __init__(self, model: Any) -> None:
        layer = model.vision_tower.vision_model.encoder.layers[-1]
        attention, projector = layer.self_attn, model.multi_modal_projector
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
        recorder.output_of(projector, "features")
        if hasattr(model, "_merge_image_patch_embeddings"):
            _watch_packing(model, recorder)
        self.handles = recorder.handles


def _watch_packing(model: Any, recorder: Recorder) -> None:
    """Record which patch of which tile each token of LLaVA-NeXT comes from, by the model's own packing of tiles.

    Patches are packed by their number and by their number plus 1: what differs is no newline.
    """
    models_pack = model._merge_image_patch_embeddings
    state: dict[str, Any] = {"first": 0, "features": None}

    def pack(image_size: Tensor, patch_embeddings: Tensor, *, strategy: str) -> Tensor:
        features = recorder.seen.get("features")
        if state["features"] is not features:  # the first image of a batch
            state["first"], state["features"] = 0, features
            recorder.record("slot_patch", [])
        tiles, patches, width = patch_embeddings.shape
        numbers = torch.arange(tiles * patches, dtype=torch.float32, device=patch_embeddings.device)
        numbers = (numbers + state["first"]).view(tiles, patches, 1).expand(-1, -1, width)
        here, later = (models_pack(image_size, values, strategy=strategy)[:, 0] for values in (numbers, numbers + 1))
        recorder.seen["slot_patch"].append(torch.where(later > here, here.long(), -1))
        state["first"] += tiles * patches
        return models_pack(image_size, patch_embeddings, strategy=strategy)

    model._merge_image_patch_embeddings = pack
