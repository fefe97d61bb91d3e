"""Structure of a vision-language model, found in its modules, config and signatures instead of in its class name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Config attributes in which transformers' classes keep the ids that stand for visual tokens
ID_NAMES = ("image_token_id", "video_token_id", "image_token_index", "video_token_index", "image_patch_id")


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the text decoder: the module that runs the ``layers`` of the text config one after the other.

    Raises:
        TypeError: no module, or a decoder whose layers are not where those of transformers are.
    """
    config = model.config.get_text_config(decoder=True)
    assert config is not None
    decoder = model.get_decoder()
    for module in () if decoder is None else decoder.modules():
        layers = getattr(module, "layers", None)
        is_text = isinstance(getattr(module, "config", None), type(config))
        if is_text and isinstance(layers, nn.ModuleList) and len(layers) == config.num_hidden_layers:
            return module
    raise TypeError(
        f"{type(model).__name__} has no text decoder with a list of {config.num_hidden_layers} `layers`, before which "
        "tokens could be removed"
    )


def refusal_of(model: PreTrainedModel) -> str:
    """Tell why no visual token of ``model`` is a token of its decoder; "" where nothing speaks against pruning."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or getattr(config.get_text_config(), "is_encoder_decoder", False):
        return "is an encoder-decoder: images enter its encoder, and its decoder has no visual tokens"
    if not hasattr(type(model), "generate"):
        return "generates no text"
    arguments = inspect.signature(type(model).forward).parameters
    if not any(name.startswith(("pixel_values", "image")) for name in arguments):
        return "takes no images"
    if "super" not in _names(type(model).generate) and "generate" in _overridden(type(model)):
        return "has a generate() of its own, which calls its decoder past the model's forward()"
    try:
        decoder = decoder_of(model)
    except TypeError as error:
        return str(error).removeprefix(f"{type(model).__name__} ")
    names = [name for name, _ in decoder.named_modules() if "cross" in name.rpartition(".")[2]]
    return f"reads its images by cross-attention ({names[0]} of its decoder)" if names else ""


def visual_id_names(config: PreTrainedConfig) -> tuple[str, ...]:
    """Name the attributes of ``config`` that hold the ids of visual tokens, each id once."""
    ids: dict[int, str] = {}
    for name in ID_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value not in ids:
            ids[value] = name
    return tuple(ids.values())


def videos_have_image_ids(base: PreTrainedModel, image_ids: Sequence[int]) -> bool:
    """Tell whether features of videos go where ``image_ids`` stand, by asking the model's own search for slots."""
    find = getattr(base, "get_placeholder_mask", None)
    if find is None or "video_features" not in inspect.signature(find).parameters:
        return False
    ids = torch.tensor([list(image_ids)])
    masks = find(ids, inputs_embeds=torch.zeros(*ids.shape, 1))
    return bool(masks[1].any())


def has_plain_positions(model: PreTrainedModel) -> bool:
    """Tell whether positions count tokens; M-RoPE's are places in images and moments of videos.

    A decoder with M-RoPE counts tokens where its model does not find places for it (MiniCPM-V 4.6).
    """
    rope = getattr(decoder_of(model).config, "rope_parameters", None) or {}
    return "mrope_section" not in rope or not any(hasattr(one, "get_rope_index") for one in (model, model.base_model))


def has_kinds_of_positions(decoder: PreTrainedModel) -> bool:
    """Tell whether rotary tables differ by kind of layer, as in Gemma 3."""
    rotary = getattr(decoder, "rotary_emb", None)  # none in a decoder without positions
    return rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters


def has_attention(layer: nn.Module) -> bool:
    """Tell whether a decoder layer calls transformers' attention interface."""
    return any("ALL_ATTENTION_FUNCTIONS" in _names(type(module).forward) for module in layer.modules())


def branches_on_backend(module: nn.Module) -> bool:
    """Tell whether an attention module does something of its own for attention backends that it knows by name."""
    consts = getattr(getattr(inspect.unwrap(type(module).forward), "__code__", None), "co_consts", ())
    return any(
        {"eager", "sdpa"} & set(const if isinstance(const, tuple) else [const])
        for const in consts
        if isinstance(const, str | tuple)
    )


def has_state(layer: nn.Module) -> bool:
    """Tell whether a decoder layer keeps a state of all earlier tokens: a convolution, a recurrence."""
    names = (name for module in layer.modules() for name in _all_names(type(module)))
    return any(state in name for name in names for state in ("conv_state", "recurrent_state", "ssm_state"))


def blocked_stages(decoder: PreTrainedModel) -> dict[int, int]:
    """Find layers before which no stage may lie, as they or later ones use keys or a selection of an earlier layer.

    Returns:
        The earlier layer, by blocked layer.
    """
    layers: Any = decoder.layers
    kinds = getattr(decoder.config, "layer_types", None) or [None] * len(layers)
    blocked: dict[int, int] = {}
    for user, layer in enumerate(layers):
        if not (names := _shared(layer)):
            continue
        rope = _attribute(layer, "use_rope")
        alike = (i for i in range(user) if kinds[i] == kinds[user] and _attribute(layers[i], "use_rope") == rope)
        source = max((i for i in alike if not names & _shared(layers[i])), default=0)
        for index in range(source + 1, user + 1):
            blocked[index] = min(source, blocked.get(index, source))
    return blocked


def _shared(layer: nn.Module) -> frozenset[str]:
    """Name what a layer takes from an earlier one: its keys and values, or its selection of keys."""
    return frozenset(name for name in ("is_kv_shared_layer", "skip_topk") if _attribute(layer, name))


def _attribute(layer: nn.Module, name: str) -> Any:
    return next((getattr(module, name) for module in layer.modules() if hasattr(module, name)), None)


def keyless_layers(layers: Any) -> frozenset[int]:
    """Return the layers without keys: a convolution or recurrence, whose mask is 2-D, or neither mask nor keys."""
    return frozenset(
        index
        for index, layer in enumerate(layers)
        if not has_attention(layer) and (has_state(layer) or not _takes_mask(layer))
    )


def _takes_mask(layer: nn.Module) -> bool:
    inner = (type(module).forward for module in layer.modules() if module is not layer)
    return any("attention_mask" in inspect.signature(forward).parameters for forward in inner)


def first_attention(layers: Any) -> int:
    """Return the first layer with keys: a cache reports its length by that layer."""
    keyless = keyless_layers(layers)
    return next((index for index in range(len(layers)) if index not in keyless), 0)


def _overridden(cls: type) -> set[str]:
    """Name the methods that ``cls`` or a base of it within its model's module defines."""
    return {name for base in cls.__mro__ if ".models." in base.__module__ for name in vars(base)}


def _names(function: Any) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return () if code is None else code.co_names


def _all_names(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        if not base.__module__.startswith("torch."):
            for function in vars(base).values():
                yield from _names(function) if inspect.isfunction(function) else ()
