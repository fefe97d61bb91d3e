"""A tower, a projector and a decoder, as in LLaVA: images of one size, a fixed number of tokens each."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.tiny_families import (
    ANYRES,
    IMAGE_ID,
    PINPOINTS,
    VISION_END_ID,
    VISION_START_ID,
    Item,
    TinyFamily,
    clip_config,
    image_of,
    internvl,
    internvl_image,
    internvl_video,
    pixels,
    text_config,
    vision_config,
)


def siglip(**changes: Any):
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**{**vision_config(), "vision_use_head": False, **changes})


def tiles(per_tile: int):
    """Make images of one and two tiles in turn."""

    def image(number: int, alone: bool, generator: torch.Generator) -> Item:
        count = 1 + number % 2
        ids = [VISION_START_ID, *[IMAGE_ID] * (per_tile * count), VISION_END_ID]
        return Item(ids, {"pixel_values": pixels(generator, count, 3, 32, 32)})

    return image


def aria():
    from transformers import AriaConfig, AriaForConditionalGeneration, AriaTextConfig, Idefics3VisionConfig

    config = AriaConfig(
        text_config=AriaTextConfig(**text_config(intermediate_size=32, moe_num_experts=4, moe_num_shared_experts=1)),
        vision_config=Idefics3VisionConfig(**vision_config()),
        projector_patch_to_query_dict={16: 9},
        initializer_range=0.3,
        image_token_index=IMAGE_ID,
    )
    model = AriaForConditionalGeneration(config)
    model.model.multi_modal_projector.query.data.normal_()  # alike at first, all answers with them
    return model


def cohere_text(**changes: Any):
    """Configure a decoder: no rotary angles in every third layer, and a window longer than the prompts."""
    from transformers import Cohere2Config

    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    return Cohere2Config(**text_config(sliding_window=500, layer_types=kinds, logit_scale=1.0, **changes))


def aya_vision():
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

    config = AyaVisionConfig(text_config=cohere_text(), vision_config=siglip(), image_token_index=IMAGE_ID)
    return AyaVisionForConditionalGeneration(config)


def cohere2_vision():
    from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

    config = Cohere2VisionConfig(
        text_config=cohere_text(), vision_config=siglip(), alignment_intermediate_size=64, image_token_id=IMAGE_ID
    )
    return Cohere2VisionForConditionalGeneration(config)


def fast_vlm():
    """Build with a ResNet for the FastViT, which timm alone has; both give maps of features."""
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration, Qwen2Config, ResNetConfig

    tower = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", hidden_size=32)
    config = FastVlmConfig(
        text_config=Qwen2Config(**text_config()), vision_config=tower, image_token_index=IMAGE_ID, image_seq_length=16
    )
    return FastVlmForConditionalGeneration(config)


def deepseek_vl():
    from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration, LlamaConfig

    config = DeepseekVLConfig(text_config=LlamaConfig(**text_config()), vision_config=siglip(), image_token_id=IMAGE_ID)
    return DeepseekVLForConditionalGeneration(config)


def deepseek_vl_hybrid():
    from transformers import (
        DeepseekVLHybridConfig,
        DeepseekVLHybridForConditionalGeneration,
        LlamaConfig,
        SamVisionConfig,
    )

    config = DeepseekVLHybridConfig(
        text_config=LlamaConfig(**text_config()),
        vision_config=siglip(),
        high_res_vision_config=SamVisionConfig(**sam()),
        image_token_id=IMAGE_ID,
    )
    return DeepseekVLHybridForConditionalGeneration(config)


def sam(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 32,
        "initializer_range": 0.3,
        **changes,
    }


def deepseek_vl_hybrid_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    item = image_of(16)(number, alone, generator)
    return Item(item.ids, {**item.tensors, "high_res_pixel_values": pixels(generator, 1, 3, 64, 64)})


def granite4_vision():
    from transformers import (
        Blip2QFormerConfig,
        CLIPVisionConfig,
        Granite4VisionConfig,
        Granite4VisionForConditionalGeneration,
        Granite4VisionTextConfig,
    )

    config = Granite4VisionConfig(
        text_config=Granite4VisionTextConfig(**text_config(attention_multiplier=0.25)),
        vision_config=CLIPVisionConfig(**clip_config() | {"hidden_size": 64}),
        qformer_config=Blip2QFormerConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64, encoder_hidden_size=64
        ),
        image_token_index=IMAGE_ID,
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="1/2",
        deepstack_layer_map=[(-1, 0), (-2, 1)],
        spatial_target_layers=[0, 1, 2, 2],
    )
    return Granite4VisionForConditionalGeneration(config)


def granite4_vision_image(number: int, alone: bool, generator: torch.Generator) -> Item:
    """Make an image in the grid of LLaVA-NeXT at half its side."""
    (height, width), _ = ANYRES[number % 2]
    tokens = 4 + (height // 16) * (width // 16) + height // 16
    values = {"pixel_values": pixels(generator, 1, 3, 3, 32, 32), "image_sizes": torch.tensor([(height, width)])}
    return Item([IMAGE_ID] * tokens, values)


def got_ocr2():
    from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration, Qwen2Config

    config = GotOcr2Config(
        text_config=Qwen2Config(**text_config()),
        vision_config=sam(),
        image_token_id=IMAGE_ID,
        image_token_index=IMAGE_ID,
    )
    return GotOcr2ForConditionalGeneration(config)


def janus():
    from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig

    # makes images, of which the tests know nothing
    vq = {
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "projection_dim": 64,
        "image_token_embed_dim": 64,
    }
    config = JanusConfig(
        text_config=LlamaConfig(**text_config()),
        vision_config={**vision_config(), "projection_dim": 64, "depth": 1},
        vq_config=vq,
        image_token_id=IMAGE_ID,
    )
    return JanusForConditionalGeneration(config)


ZOO = {
    "AriaForConditionalGeneration": TinyFamily(aria, image_of(9)),
    "AyaVisionForConditionalGeneration": TinyFamily(aya_vision, tiles(4)),
    "Cohere2VisionForConditionalGeneration": TinyFamily(cohere2_vision, tiles(4)),
    "FastVlmForConditionalGeneration": TinyFamily(fast_vlm, image_of(16)),
    "DeepseekVLForConditionalGeneration": TinyFamily(deepseek_vl, image_of(16)),
    "DeepseekVLHybridForConditionalGeneration": TinyFamily(deepseek_vl_hybrid, deepseek_vl_hybrid_image),
    "Granite4VisionForConditionalGeneration": TinyFamily(granite4_vision, granite4_vision_image, min_stage=2),
    "GotOcr2ForConditionalGeneration": TinyFamily(got_ocr2, image_of(4, 1, 3, 64, 64)),
    "InternVLForConditionalGeneration": TinyFamily(internvl, internvl_image, internvl_video),
    "JanusForConditionalGeneration": TinyFamily(janus, image_of(16)),
}
