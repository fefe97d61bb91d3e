"""Prune an image once and ask it several questions: the cache of keys and values is copied for each.

python examples/one_image_many_questions.py
"""

import copy
from pathlib import Path

import torch
from PIL import Image

from toprl_models import DivPrune, Schedule, attach, tiny

QUESTIONS = ("which digit is in the picture ?", "is there a red one ?", "what shape is at the top right ?")

model, processor = tiny.load()
image = Image.open(Path(__file__).parents[1] / "docs/scene.png")
prefix = processor(images=image, text=tiny.IMAGE, return_tensors="pt")
# DivPrune reads no question, so that the image may be pruned before one is known
with attach(model, DivPrune(), schedule=Schedule(((0, 32),))), torch.no_grad():
    cache = model(**prefix, use_cache=True).past_key_values
    for question in QUESTIONS:
        ids = processor.tokenizer(f"{question} {tiny.ANSWER}", add_special_tokens=False, return_tensors="pt").input_ids
        logits = model(input_ids=ids, past_key_values=copy.deepcopy(cache)).logits
        print(question, processor.decode(logits[0, -1].argmax()))
