"""A task of our own for lmms-eval, and tiny models in folders, all written by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.models.tiny_families import HIDDEN_SIZE, text_config
from toprl_models import TopRLPolicy, tiny
from toprl_models.methods.toprl import model_signature

NAME = "toprl_local"
MAX_NEW_TOKENS = 16  # that of the custom task
WORDS = "what is in the picture red green blue left right one two three four five".split()
QUESTIONS = ("what is in the picture", "what is left", "is the picture red or green", "what is right")

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_visual: !function utils.doc_to_visual
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {max_new_tokens}
metric_list:
  - metric: agreement
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def process_results(doc, results):
    return {"agreement": float(results[0].strip().lower() == doc["answer"].lower())}
"""


def write_samples(folder: Path, answers: list[str], size: int) -> Path:
    """``test.jsonl`` for lmms-eval and for the custom task: coloured noise, one question each."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    rows = []
    for number, answer in enumerate(answers):
        patches = draw.integers(0, 256, (size // 14, size // 14, 3), dtype=np.uint8)
        picture = folder / f"{number}.png"
        Image.fromarray(patches).resize((size, size), Image.Resampling.NEAREST).save(picture)
        question = QUESTIONS[number % len(QUESTIONS)]
        rows.append({"image": str(picture), "question": question, "answer": answer})
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_task(folder: Path, samples: Path) -> Path:
    """The folder that lmms-eval's ``--include_path`` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    task = TASK.format(name=NAME, data=samples / "test.jsonl", max_new_tokens=MAX_NEW_TOKENS)
    (folder / f"{NAME}.yaml").write_text(task)
    (folder / "utils.py").write_text(UTILS)
    return folder


def save_llava(folder: Path) -> Path:
    """A random LLaVA of 6 layers with 64 visual tokens, with its processor."""
    processor = tiny.build_processor(WORDS)
    model = tiny.build_model(len(processor.tokenizer))
    # lmms-eval's simple models ask the tokenizer, with the placeholder and the question in one string
    processor.chat_template = processor.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}answer {% endif %}"
        "{% if m['content'] is string %}{{ m['content'] }} {% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
        "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}answer{% endif %}"
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_qwen(folder: Path) -> Path:
    """A random Qwen2.5-VL of 6 layers, patches of 14 pixels, with its processor."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    processor = qwen_processor()
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=text_config(
            vocab_size=len(processor.tokenizer),
            pad_token_id=ids("<pad>"),
            bos_token_id=None,
            eos_token_id=ids("<|im_end|>"),
            rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]},
        ),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": HIDDEN_SIZE,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def qwen_processor() -> Any:
    """Qwen2.5-VL's processor around a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    marks = "<pad> <unk> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
    roles = ["system", "user", "assistant"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*marks, *roles, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=marks[2:],
    )
    template = (
        "{% for m in messages %}<|im_start|> {{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
        " <|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
    )
    pixels = {"min_pixels": 28 * 28, "max_pixels": 112 * 112}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=template,
    )


def save_policy(folder: Path, model_folder: Path, stages: list[int]) -> Path:
    """An untrained actor for the model in ``model_folder``."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    torch.manual_seed(0)
    width = model.config.get_text_config().hidden_size
    TopRLPolicy(width, stages, 16, model_signature(model), metadata={"model": str(model_folder)}).save_pretrained(
        folder
    )
    return folder
