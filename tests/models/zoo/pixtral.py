"""Tiny models with a Pixtral tower, which takes images of any size: Mistral's own and LightOn-OCR."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.models.tiny_families import IMAGE_ID, Item, TinyFamily, pixels, text_config, vision_config
from tests.models.zoo.elsewhere import no_tokens

SIZES = ((32, 32), (16, 32), (32, 24))


def pixtral_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    """Images are padded to a common size; 2 x 2 patches of 4 x 4 pixels are a token."""
    height, width = SIZES[number % len(SIZES)]
    values = torch.zeros(1, 3, 32, 32)
    values[:, :, :height, :width] = pixels(generator, 1, 3, height, width)
    return Item(
        [IMAGE_ID] * (height * width // 64),
        {"pixel_values": values, "image_sizes": torch.tensor([[height, width]])},
    )


def pixtral_config() -> Any:
    return transformers.PixtralVisionConfig(**vision_config(patch_size=4, head_dim=16, initializer_range=0.3))


def mistral3(make_text: Any = transformers.MistralConfig) -> Any:
    config = transformers.Mistral3Config(
        text_config=make_text(**text_config(head_dim=16, sliding_window=None)),
        vision_config=pixtral_config(),
        image_token_index=IMAGE_ID,
        tie_word_embeddings=False,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def lighton_ocr() -> Any:
    config = transformers.LightOnOcrConfig(
        text_config=transformers.Qwen3Config(**text_config(head_dim=16)),
        vision_config=pixtral_config(),
        image_token_id=IMAGE_ID,
        tie_word_embeddings=False,
    )
    return transformers.LightOnOcrForConditionalGeneration(config)


LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}


def mistral4() -> Any:
    return transformers.Mistral4ForCausalLM(transformers.Mistral4Config(**text_config(**LATENT)))


def mistral_large4() -> Any:
    """Indexed attention over latent keys; every other layer has no rotary, and layer 3 uses the keys of layer 1."""
    text = {key: value for key, value in LATENT.items() if key != "q_lora_rank"}
    config = transformers.MistralLarge4Config(
        text_config=text_config(
            **text,
            index_topk=24,
            index_head_dim=16,
            index_n_heads=2,
            no_rope_layers=[1, 0] * 3,
            kv_source_layers=[0, 1, 2, 1, 4, 5],
        ),
        vision_config=pixtral_config(),
        image_token_index=IMAGE_ID,
    )
    return transformers.MistralLarge4ForConditionalGeneration(config)


ZOO = {
    "Mistral3ForConditionalGeneration": TinyFamily(mistral3, pixtral_image),
    "Mistral3ForConditionalGeneration+ministral3": TinyFamily(
        lambda: mistral3(transformers.Ministral3Config), pixtral_image
    ),
    "LightOnOcrForConditionalGeneration": TinyFamily(lighton_ocr, pixtral_image),
    "Mistral4ForCausalLM": TinyFamily(mistral4, no_tokens, not_a_case="a decoder of text alone, without a tower"),
    "MistralLarge4ForConditionalGeneration": TinyFamily(mistral_large4, pixtral_image),
}
