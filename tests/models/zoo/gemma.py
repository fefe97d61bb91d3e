"""The Gemma family: layers with a window beside layers without, images whose tokens see each other."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.models.tiny_families import (
    FIRST_WORD,
    IMAGE_ID,
    VIDEO_ID,
    VISION_END_ID,
    VISION_START_ID,
    VOCABULARY,
    Item,
    Rows,
    TinyFamily,
    image_of,
    pixels,
    text_config,
    vision_config,
)

AUDIO_ID = 94
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2
MARKS = {"boi_token_id": VISION_START_ID, "eoi_token_id": VISION_END_ID, "image_token_id": IMAGE_ID}


def gemma_text(**changes: Any) -> dict[str, Any]:
    """Configure a decoder whose window is longer than the prompts."""
    return text_config(**{"head_dim": 16, "sliding_window": 500, "layer_types": list(LAYER_TYPES), **changes})


def gemma3():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    config = Gemma3Config(
        text_config=Gemma3TextConfig(**gemma_text()),
        vision_config=SiglipVisionConfig(**vision_config(patch_size=4), vision_use_head=False),
        mm_tokens_per_image=16,
        image_token_index=IMAGE_ID,
        boi_token_index=VISION_START_ID,
        eoi_token_index=VISION_END_ID,
        tie_word_embeddings=False,  # random models whose embeddings are their head repeat the last word
        initializer_range=0.3,
    )
    model = Gemma3ForConditionalGeneration(config)
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(std=0.3)  # zeros at first
    return model


def with_token_types(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    return {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE_ID).long()}


def gemma3n():
    """Build with a layer of patches for the MobileNet, which timm alone has; both give maps of features."""
    from transformers import (
        AutoModel,
        Gemma3nAudioConfig,
        Gemma3nConfig,
        Gemma3nForConditionalGeneration,
        Gemma3nTextConfig,
        Gemma3nVisionConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class PatchesConfig(Gemma3nVisionConfig):
        model_type = "gemma3n_patches"

    class Patches(PreTrainedModel):
        config_class = PatchesConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.patches = torch.nn.Conv2d(3, config.hidden_size, 8, stride=8)
            self.post_init()

        def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
            return BaseModelOutputWithPooling(last_hidden_state=self.patches(pixel_values))

    AutoModel.register(PatchesConfig, Patches, exist_ok=True)
    tower = PatchesConfig(hidden_size=32, vocab_size=4, vocab_offset=VOCABULARY)
    audio = Gemma3nAudioConfig(
        vocab_size=4,
        vocab_offset=VOCABULARY + 4,
        input_feat_size=16,
        hidden_size=16,
        conf_num_attention_heads=2,
        conf_num_hidden_layers=1,
        sscp_conv_channel_size=(4, 4),
    )
    text = Gemma3nTextConfig(
        **gemma_text(
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=8,
            laurel_rank=8,
            num_kv_shared_layers=2,
            altup_num_inputs=2,
        )
    )
    config = Gemma3nConfig(
        text_config=text,
        vision_config=tower,
        audio_config=audio,
        vision_soft_tokens_per_image=16,
        audio_token_id=AUDIO_ID,
        **MARKS,
    )
    return Gemma3nForConditionalGeneration(config)


def gemma4_tower():
    from transformers import Gemma4VisionConfig

    return Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        patch_size=4,
        pooling_kernel_size=2,
        position_embedding_size=16,
        initializer_range=0.3,
    )


def gemma4(**changes: Any):
    """Build without values of every token for every layer; ``changes`` are those of the text."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig

    # queries and keys are normed and the products not scaled: short heads keep the weights from being one-hot
    heads = {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0}
    text = Gemma4TextConfig(**gemma_text(vocab_size_per_layer_input=VOCABULARY, **heads | changes))
    config = Gemma4Config(
        text_config=text,
        vision_config=gemma4_tower(),
        audio_config=None,
        video_token_id=VIDEO_ID,
        audio_token_id=AUDIO_ID,
        tie_word_embeddings=False,
        initializer_range=0.3,
        **MARKS,
    )
    return Gemma4ForConditionalGeneration(config)


def gemma4_unified():
    from transformers import (
        Gemma4UnifiedConfig,
        Gemma4UnifiedForConditionalGeneration,
        Gemma4UnifiedTextConfig,
        Gemma4UnifiedVisionConfig,
    )

    config = Gemma4UnifiedConfig(
        text_config=Gemma4UnifiedTextConfig(**gemma_text(head_dim=8, global_head_dim=16)),
        vision_config=Gemma4UnifiedVisionConfig(
            patch_size=4, pooling_kernel_size=2, mm_embed_dim=32, mm_posemb_size=16, output_proj_dims=32
        ),
        audio_config=None,
        video_token_id=VIDEO_ID,
        audio_token_id=AUDIO_ID,
        **MARKS,
    )
    return Gemma4UnifiedForConditionalGeneration(config)


PATCHES = ((8, 8), (4, 12), (8, 4))  # width and height in patches of 4 x 4
MOST_PATCHES = 64


def _patches(number: int, side: int, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Make patches of one image, padded to ``most``: values [1, most, 3 * side^2], positions [1, most, 2], a count."""
    width, height = PATCHES[number % len(PATCHES)]
    width, height = width * 4 // side, height * 4 // side
    places = torch.full((1, most, 2), -1)
    places[0, : width * height] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
    values = pixels(generator, 1, most, 3 * side**2).sigmoid()
    return values * (places[..., :1] >= 0), places, width * height


def gemma4_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    values, places, count = _patches(number, 4, MOST_PATCHES, generator)
    return Item(
        [VISION_START_ID, *[IMAGE_ID] * (count // 4), VISION_END_ID],
        {"pixel_values": values, "image_position_ids": places},
    )


def gemma4_video(number: int, generator: torch.Generator) -> Item:
    """Two frames of one size, each after its time stamp."""
    ids, frames = [], [gemma4_image(number, False, generator) for _ in range(2)]
    for frame, item in enumerate(frames):
        ids += [FIRST_WORD + frame, *(VIDEO_ID if token == IMAGE_ID else token for token in item.ids)]
    return Item(
        ids,
        {
            "pixel_values_videos": torch.cat([item.tensors["pixel_values"] for item in frames]),
            "video_position_ids": torch.cat([item.tensors["image_position_ids"] for item in frames]),
            "num_frames_per_video": torch.tensor([2]),
        },
    )


def gemma4_unified_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    values, places, count = _patches(number, 8, MOST_PATCHES // 4, generator)
    return Item(
        [VISION_START_ID, *[IMAGE_ID] * count, VISION_END_ID],
        {"pixel_values": values, "image_position_ids": places},
    )


ZOO = {
    "Gemma3ForConditionalGeneration": TinyFamily(gemma3, image_of(16), finish=with_token_types, blocks="image"),
    "Gemma3nForConditionalGeneration": TinyFamily(gemma3n, image_of(16)),
    "Gemma4ForConditionalGeneration": TinyFamily(gemma4, gemma4_image, gemma4_video, is_qwen=True),
    "Gemma4ForConditionalGeneration+per_layer_inputs": TinyFamily(
        partial(gemma4, hidden_size_per_layer_input=8), gemma4_image, is_qwen=True
    ),
    "Gemma4ForConditionalGeneration+shared_kv": TinyFamily(
        partial(gemma4, hidden_size_per_layer_input=8, num_kv_shared_layers=2), gemma4_image, is_qwen=True
    ),
    "Gemma4ForConditionalGeneration+experts": TinyFamily(
        partial(gemma4, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16),
        gemma4_image,
        is_qwen=True,
    ),
    "Gemma4ForConditionalGeneration+blocks_of_images": TinyFamily(
        partial(gemma4, use_bidirectional_attention="vision"), gemma4_image, is_qwen=True
    ),
    "Gemma4UnifiedForConditionalGeneration": TinyFamily(gemma4_unified, gemma4_unified_image, is_qwen=True),
}
