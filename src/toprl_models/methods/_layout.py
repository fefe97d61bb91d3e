"""How a model makes visual tokens of pictures, found by looking at its vision tower: layers, class token, merging."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toprl_models.runtime.scores import attention_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Parameters that are a class token: CLIP's, and that of ViT and its relatives
CLASS_TOKENS = ("class_embedding", "cls_token")
# Arguments of towers that take padded lists of patches (SigLIP 2, Gemma 4) or one strip of them (MiniCPM-V)
LISTS_OF_PATCHES = ("spatial_shapes", "pixel_position_ids", "target_sizes")


def image_tower(model: PreTrainedModel) -> PreTrainedModel:
    """Find the module that encodes pictures.

    Raises:
        ValueError: the model has none under the names that transformers gives such modules.
    """
    base = model.base_model
    tower = base.get_encoder(modality="image")
    if tower is base or tower is model.get_decoder():
        raise ValueError(
            f"model: {type(model).__name__} has no vision tower that get_encoder(modality='image') finds; choose a "
            "method that prunes by the decoder's states"
        )
    return tower


def projector_of(model: PreTrainedModel) -> nn.Module | None:
    """Find the module between tower and decoder; None where the tower itself makes visual tokens (Qwen).

    Raises:
        ValueError: there are several candidates.
    """
    from transformers import PreTrainedModel

    children = model.base_model.named_children()
    found = {name: module for name, module in children if not isinstance(module, PreTrainedModel)}
    if len(found) > 1:
        raise ValueError(f"model: which of {', '.join(found)} of {type(model).__name__} makes visual tokens?")
    return next(iter(found.values()), None)


def has_class_token(tower: nn.Module) -> bool:
    """Tell whether a class token goes before the patches."""
    return any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in tower.named_parameters())


def takes_grids(tower: nn.Module) -> bool:
    """Tell whether the tower takes patches that the processor cut and ordered block by block (Qwen)."""
    return "grid_thw" in inspect.signature(tower.forward).parameters


def has_blocks(tower: nn.Module, projector: nn.Module | None) -> bool:
    """Tell whether the patches of a token follow each other.

    So Qwen's processor orders them; a projector that is told the grid puts blocks together itself (PaddleOCR-VL).
    """
    told = () if projector is None else inspect.signature(projector.forward).parameters
    return takes_grids(tower) and not any("grid" in name for name in told)


def layers_of(tower: nn.Module) -> nn.ModuleList:
    """Find the layers of a tower: its longest list of modules with one attention each.

    Raises:
        ValueError: there is none.
    """
    stacks = [module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module)]
    stacks = [stack for stack in stacks if _attends(stack[0])]
    if not stacks:
        raise ValueError(
            f"model: the vision tower ({type(tower).__name__}) has no layers with one attention of transformers' "
            "attention interface each, so what its patches attend to cannot be read"
        )
    return max(stacks, key=len)


def _attends(layer: nn.Module) -> bool:
    try:
        attention_of(layer)
    except ValueError:
        return False
    return True


def read_layer(config: PreTrainedConfig, tower: PreTrainedModel) -> nn.Module:
    """Find the layer whose output becomes visual tokens; of a tower with windows the last one that attends to all.

    The model's ``config.vision_feature_layer`` selects it (-2 in the released LLaVAs, and in the code of VisionZip's
    and FasterVLM's authors); models without that setting use the last layer.

    Raises:
        ValueError: no such layer, or several.
    """
    layers, selected = layers_of(tower), getattr(config, "vision_feature_layer", -1)
    if isinstance(selected, int):
        # hidden_states[0] of the tower are the embeddings, hidden_states[i + 1] is the output of layer i
        index = selected + len(layers) if selected < 0 else selected - 1
        if index == len(layers) - 1:
            index = max(getattr(tower.config, "fullatt_block_indexes", None) or [index])
        if 0 <= index < len(layers):
            return layers[index]
    raise ValueError(
        f"model: config.vision_feature_layer={selected!r} must be one of the vision tower's {len(layers)} layers"
    )


def merge_side(model: PreTrainedModel, tower: PreTrainedModel) -> int:
    """Return m, where m x m patches become one visual token; 1 where a patch is a token.

    Sources: ``spatial_merge_size`` (Qwen, Mistral 3), ``scale_factor`` (Idefics 3, SmolVLM), ``downsample_factor``,
    ``hidden_stride`` (Ovis2), ``downsample_ratio`` (InternVL), or ``mm_tokens_per_image`` (Gemma 3). What they say is
    checked against the numbers of patches and tokens in each forward pass.
    """
    for config in (tower.config, model.config):
        for name in ("spatial_merge_size", "scale_factor", "downsample_factor", "hidden_stride"):
            if getattr(config, name, None):
                return int(getattr(config, name))
        if getattr(config, "downsample_ratio", None):
            return round(1 / config.downsample_ratio)
    if tokens := getattr(model.config, "mm_tokens_per_image", None):
        return tower.config.image_size // (tower.config.patch_size * math.isqrt(tokens))
    return 1


@dataclass(frozen=True)
class Layout:
    """Structure of a model's vision tower.

    Attributes:
        has_class_token: whether a class token goes before the patches; it is dropped before the projector.
        merge: ``merge_side``.
        by_blocks: the patches of a token follow each other; else patches are in raster order.
        window: side in tokens of the windows by which the tower orders its tokens; 0 where it does not.
        patch_size: height and width in pixels.
    """

    has_class_token: bool
    merge: int
    by_blocks: bool
    window: int
    patch_size: tuple[int, int]

    def grids(self, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Return height and width in patches of each picture, from the ``arguments`` of the tower.

        Raises:
            ValueError: the arguments do not tell.
        """
        if arguments.get("grid_thw") is not None:
            return [(height, width) for frames, height, width in arguments["grid_thw"].tolist() for _ in range(frames)]
        sizes = arguments.get("image_sizes")
        if sizes is None:
            shape = arguments["pixel_values"]
            if len(shape) != 4:
                raise ValueError(f"pixel_values: [{', '.join(map(str, shape))}] does not tell the pictures' sizes")
            sizes = [shape[2:]] * shape[0]
        down, across = self.patch_size
        return [(int(height) // down, int(width) // across) for height, width in sizes]

    def merged(self, values: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Average the ``values`` ``[patches, c]`` over the patches of each visual token: ``[tokens, c]``.

        Args:
            values: in the order of the tower.
            grids: height and width in patches of each picture.
        """
        m = self.merge
        if self.by_blocks:
            tokens = values.unflatten(0, (-1, m * m)).mean(1)
            return tokens[self.order(grids).argsort().to(tokens.device)] if self.window else tokens
        pictures = values.split([height * width for height, width in grids])
        blocks = [
            picture.view(height // m, m, width // m, m, -1).mean((1, 3)).flatten(0, 1)
            for picture, (height, width) in zip(pictures, grids, strict=True)
        ]
        return torch.cat(blocks)

    def order(self, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Number the visual tokens in the order in which a tower with windows has them: int64 ``[tokens]``.

        Window by window in raster order, and in raster order within each; as the tower of Qwen2.5-VL does.
        """
        numbers, start = [], 0
        for height, width in ((height // self.merge, width // self.merge) for height, width in grids):
            row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            across = -(-width // self.window)
            window = row // self.window * across + column // self.window
            numbers.append(window.flatten().argsort(stable=True) + start)
            start += height * width
        return torch.cat(numbers)


def layout_of(model: PreTrainedModel) -> Layout:
    """Find the structure of a model's vision tower.

    Raises:
        ValueError: the class token is a visual token itself, or a patch is dropped; or the tower takes pictures in a
            form that does not tell their patches.
    """
    tower = image_tower(model)
    lists = [name for name in inspect.signature(tower.forward).parameters if name in LISTS_OF_PATCHES]
    if lists:
        raise ValueError(
            f"model: the vision tower ({type(tower).__name__}) takes lists of patches ({lists[0]}), of which this "
            "method does not know which become one token"
        )
    has_class, strategy = has_class_token(tower), getattr(model.config, "vision_feature_select_strategy", None)
    if has_class and not hasattr(model.config, "vision_feature_select_strategy"):
        raise ValueError(
            f"model: the vision tower ({type(tower).__name__}) has a class token, and nothing in the config of "
            f"{type(model).__name__} says where it goes"
        )
    if has_class != (strategy == "default"):
        wanted = '"default", so that the class token is no visual token itself' if has_class else '"full"'
        raise ValueError(
            f"model: config.vision_feature_select_strategy={strategy!r} must be {wanted}: the vision tower "
            f"({type(tower).__name__}) has {'a' if has_class else 'no'} class token"
        )
    merge, size = merge_side(model, tower), getattr(tower.config, "patch_size", None)
    if size is None:
        raise ValueError(f"model: the config of the vision tower ({type(tower).__name__}) has no patch_size")
    down, across = (size, size) if isinstance(size, int) else size
    blocks = has_blocks(tower, projector_of(model))
    windowed = blocks and getattr(tower.config, "fullatt_block_indexes", None) is not None
    window = tower.config.window_size // merge // down if windowed else 0
    return Layout(has_class, merge, blocks, window, (down, across))
