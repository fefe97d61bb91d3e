"""Tiny models whose images stay out of the decoder's tokens, and Kosmos-2.5, whose prompts mark them by a mask."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from tests.models.tiny_families import (
    BOS_ID,
    EOS_ID,
    HIDDEN_SIZE,
    IMAGE_ID,
    NUM_LAYERS,
    PAD_ID,
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

IDS = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}


def apart(*shape: int, name: str = "pixel_values"):
    """Make images that no id stands for."""

    def image(number: int, alone: bool, generator: torch.Generator) -> Item:
        return Item([], {name: pixels(generator, *shape)})

    return image


def as_decoder(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Pass the words to the decoder, and the images of rows with one image each to the encoder."""
    inputs["decoder_input_ids"] = inputs.pop("input_ids")
    inputs["decoder_attention_mask"] = inputs.pop("attention_mask")
    return inputs


# --- Kosmos-2.5: 9 latent tokens an image ---


def kosmos2_5() -> Any:
    config = transformers.Kosmos2_5Config(
        text_config={
            "vocab_size": VOCABULARY,
            "embed_dim": HIDDEN_SIZE,
            "layers": NUM_LAYERS,
            "ffn_dim": 128,
            "attention_heads": 4,
            "max_position_embeddings": 200,
            "init_std": 0.3,
            **IDS,
        },
        vision_config={
            "hidden_size": 32,
            "patch_embed_hidden_size": 3 * 4 * 4,
            "intermediate_size": 64,
            "head_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_num_patches": 64,
            "initializer_range": 0.3,
        },
        latent_query_num=9,
        tie_word_embeddings=False,
    )
    return transformers.Kosmos2_5ForConditionalGeneration(config)


def kosmos2_5_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    """16 patches behind their row and column."""
    places = torch.cartesian_prod(torch.arange(1.0, 5.0), torch.arange(1.0, 5.0))
    patches = torch.cat([places, pixels(generator, 16, 3 * 4 * 4)], 1)
    return Item([VISION_START_ID, *[IMAGE_ID] * 9, VISION_END_ID], {"flattened_patches": patches.unsqueeze(0)})


def kosmos2_5_finish(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    return inputs | {"image_embeds_position_mask": (inputs["input_ids"] == IMAGE_ID).long()}


# --- encoder-decoders ---


def pix2struct() -> Any:
    shared = {"hidden_size": HIDDEN_SIZE, "d_ff": 128, "d_kv": 16}
    config = transformers.Pix2StructConfig(
        text_config={**shared, "vocab_size": VOCABULARY, "num_layers": NUM_LAYERS, "num_heads": 4, **IDS},
        vision_config={
            **shared,
            "patch_embed_hidden_size": 3 * 4 * 4,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "seq_len": 16,
        },
        initializer_range=0.3,
    )
    return transformers.Pix2StructForConditionalGeneration(config)


def pix2struct_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    return Item([], kosmos2_5_image(number, alone, generator).tensors)


def pp_formulanet() -> Any:
    vision = vision_config(patch_size=4)
    del vision["intermediate_size"]
    config = transformers.PPFormulaNetConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN_SIZE,
            "decoder_layers": NUM_LAYERS,
            "encoder_layers": 2,
            "decoder_ffn_dim": 128,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 200,
            "init_std": 0.3,
            **IDS,
        },
        vision_config={
            **vision,
            "output_channels": 16,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 64,
            "post_conv_in_channels": 16,
            "post_conv_mid_channels": 16,
            "post_conv_out_channels": 16,
            "decoder_hidden_size": HIDDEN_SIZE,
            "initializer_range": 0.3,
        },
    )
    return transformers.PPFormulaNetForConditionalGeneration(config)


def t5gemma2() -> Any:
    text = text_config(
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=500,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )
    config = transformers.T5Gemma2Config(
        encoder=transformers.T5Gemma2EncoderConfig(
            text_config=text,
            vision_config=transformers.SiglipVisionConfig(**vision_config(), vision_use_head=False),
            image_token_index=IMAGE_ID,
            boi_token_index=VISION_START_ID,
            eoi_token_index=VISION_END_ID,
            mm_tokens_per_image=4,
        ),
        decoder=transformers.T5Gemma2DecoderConfig(**text),
        image_token_index=IMAGE_ID,
    )
    model = transformers.T5Gemma2ForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):
            torch.nn.init.normal_(weight, std=0.3)  # begins at zero, which shuts the images out
    return model


def starting(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Give the decoder its first token."""
    return inputs | {"decoder_input_ids": torch.full((len(rows), 1), BOS_ID)}


def udop() -> Any:
    config = transformers.UdopConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN_SIZE,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=NUM_LAYERS,
        num_heads=4,
        image_size=32,
        patch_size=8,
        max_2d_position_embeddings=64,
        **IDS,
    )
    return transformers.UdopForConditionalGeneration(config)


def udop_finish(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Put every word at the upper left of its page."""
    boxes = torch.tensor([0.0, 0.0, 0.25, 0.25]).expand(*inputs["input_ids"].shape, 4)
    return starting(inputs, rows) | {"bbox": boxes}


def vision_encoder_decoder() -> Any:
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**vision_config()),
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=HIDDEN_SIZE,
            n_layer=NUM_LAYERS,
            n_head=4,
            n_positions=200,
            initializer_range=0.3,
            **IDS,
        ),
    )
    return transformers.VisionEncoderDecoderModel(config=config)


# --- cross-attention ---


def mllama() -> Any:
    config = transformers.MllamaConfig(
        text_config=text_config(
            cross_attention_layers=[2, 4], rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
        ),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "initializer_range": 0.3,
        },
        image_token_index=IMAGE_ID,
    )
    model = transformers.MllamaForConditionalGeneration(config)
    for name, gate in model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.ones_(gate)  # gates begin at zero, which shuts the images out
    return model


def mllama_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    """Two tiles side by side; one id in the prompt says where the image was."""
    return Item([IMAGE_ID], {"pixel_values": pixels(generator, 1, 1, 2, 3, 32, 32)})


def mllama_finish(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    batch, length = inputs["input_ids"].shape
    return inputs | {
        "aspect_ratio_ids": torch.full((batch, 1), 2),
        "aspect_ratio_mask": torch.ones(batch, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(batch, length, 1, 2, dtype=torch.long),
    }


# --- actions instead of words ---


def pi0() -> Any:
    text = transformers.GemmaConfig(**text_config(head_dim=16))
    vlm = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**vision_config(), vision_use_head=False),
        image_token_index=IMAGE_ID,
        projection_dim=HIDDEN_SIZE,
        hidden_size=HIDDEN_SIZE,
        vocab_size=VOCABULARY,
    )
    config = transformers.PI0Config(
        vlm_config=vlm,
        dit_config=transformers.GemmaConfig(**text_config(head_dim=16)),
        chunk_size=4,
        max_state_dim=8,
        max_action_dim=8,
        num_inference_steps=2,
    )
    model = transformers.PI0ForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig()  # the class has none: it does not generate
    return model


def pi0_finish(inputs: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """One camera a row; a robot's state and the noise that actions begin as."""
    generator = torch.Generator().manual_seed(1)
    return inputs | {
        "pixel_values": inputs["pixel_values"].unsqueeze(1),
        "pixel_attention_mask": torch.ones(len(rows), 1, dtype=torch.bool),
        "state": pixels(generator, len(rows), 8),
        "noise": pixels(generator, len(rows), 4, 8),
        "timestep": torch.full((len(rows),), 0.5),
    }


CROSS_ATTENTION = "an encoder-decoder: the decoder reads the image by cross-attention"
IN_THE_ENCODER = "an encoder-decoder: image and prompt are tokens of the encoder"

ZOO = {
    "Kosmos2_5ForConditionalGeneration": TinyFamily(kosmos2_5, kosmos2_5_image, finish=kosmos2_5_finish),
    "Pix2StructForConditionalGeneration": TinyFamily(
        pix2struct, pix2struct_image, finish=as_decoder, not_a_case=CROSS_ATTENTION
    ),
    "PPFormulaNetForConditionalGeneration": TinyFamily(
        pp_formulanet, apart(1, 3, 32, 32), finish=as_decoder, not_a_case=CROSS_ATTENTION
    ),
    "VisionEncoderDecoderModel": TinyFamily(
        vision_encoder_decoder, apart(1, 3, 32, 32), finish=as_decoder, not_a_case=CROSS_ATTENTION
    ),
    "T5Gemma2ForConditionalGeneration": TinyFamily(t5gemma2, image_of(4), finish=starting, not_a_case=IN_THE_ENCODER),
    "UdopForConditionalGeneration": TinyFamily(
        udop, apart(1, 3, 32, 32), finish=udop_finish, not_a_case=IN_THE_ENCODER
    ),
    "MllamaForConditionalGeneration": TinyFamily(
        mllama, mllama_image, finish=mllama_finish, not_a_case="layers of the decoder read the image by cross-attention"
    ),
    "PI0ForConditionalGeneration": TinyFamily(
        pi0,
        image_of(16),
        finish=pi0_finish,
        not_a_case="a second transformer reads the keys of the prompt and predicts a robot's actions, not words",
    ),
}
