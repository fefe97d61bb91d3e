"""A tiny random LLaVA with grouped queries, and prompts with differing numbers of images."""

from __future__ import annotations

import pytest
import torch

from toprl_models import Policy

IMAGE_ID, PAD_ID, EOS_ID = 1, 0, 2
TOKENS_PER_IMAGE = 16
NUM_LAYERS = 6


def build_model(attn_implementation: str = "sdpa", seed: int = 0):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        # large enough that dropping tokens moves the logits well beyond rounding
        initializer_range=0.3,
        pad_token_id=PAD_ID,
        bos_token_id=3,
        eos_token_id=EOS_ID,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID, vision_feature_layer=-1)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": attn_implementation})
    model.generation_config.eos_token_id = None  # random models must not stop early
    model.requires_grad_(False)
    return model


def build_inputs(images: tuple[int, ...], seed: int = 0, padding_side: str = "left") -> dict[str, torch.Tensor]:
    """One prompt per entry with that many images; lengths differ, shorter prompts are padded."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(4, 97, (n,), generator=generator).tolist()

    prompts = []
    for row, count in enumerate(images):
        ids = [3, *words(2 + row)]
        for _ in range(count):
            ids += [IMAGE_ID] * TOKENS_PER_IMAGE + words(2)
        prompts.append(ids + words(3 + 2 * row))
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), PAD_ID)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(length - len(prompt), None) if padding_side == "left" else slice(None, len(prompt))
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if sum(images):
        inputs["pixel_values"] = torch.randn(sum(images), 3, 32, 32, generator=generator)
    return inputs


BATCHES = {"single": (1,), "padded": (1, 2, 0), "padded_all": (2, 1, 1)}


class HashPolicy(Policy):
    """Scores that depend on (stage, raster number) alone: the same in both modes, different at each stage."""

    def __init__(self) -> None:
        self.calls = 0

    def score(self, context):
        self.calls += 1
        number = context.visual_index.double() + 1
        return torch.sin(number * 12.9898 * (context.stage + 1)).mul(43758.5453).frac().abs().float()


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return build_model(request.param)


@pytest.fixture(params=list(BATCHES))
def inputs(request):
    return build_inputs(BATCHES[request.param])


@pytest.fixture
def hash_policy():
    return HashPolicy()
