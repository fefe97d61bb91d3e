"""MathVista's answers by rules. The benchmark's own script lets a language model extract the answer from the reply and
takes the most similar option for anything that is none; here a reply without a recognisable answer is wrong, so numbers
come out lower for models that talk much."""

from __future__ import annotations

import ast
import re

from training.metrics import choice_letter, exact_match
from training.tasks.base import Sample

NUMBER = r"(?<![\w.])-?(?:\d[\d,]*\.?\d*|\.\d+)(?:e-?\d+)?"
# "the answer is 5", "Answer: 5", "= 5"
CUE = re.compile(rf"(?:answer(?:\s+is)?\s*:?|=|≈)\s*\$?\s*({NUMBER})", re.IGNORECASE)
INSTRUCTIONS = {
    "multi_choice": "Answer with the option's letter from the given choices directly.",
    "integer": "Answer the question using a single integer number.",
    "float": "Answer the question using a single floating-point number with {places} decimal place{s}.",
    "list": "Answer the question using a Python list.",
    "text": "Answer the question using a single word or phrase.",
}


def instruction(sample: Sample) -> str:
    """What the question asks for."""
    kind = "multi_choice" if sample.choices else sample.info["answer_type"]
    places = int(sample.info["precision"] or 1)
    return INSTRUCTIONS[kind].format(places={1: "one", 2: "two", 3: "three"}.get(places, places), s="s"[: places > 1])


def extract_number(reply: str) -> float | None:
    """The number after the last "answer is", "answer:" or "=", else the last number of the reply."""
    found = CUE.findall(reply) or re.findall(NUMBER, reply)
    return float(found[-1].replace(",", "")) if found else None


def extract_list(reply: str) -> list[float] | None:
    """The last bracketed list of numbers of the reply."""
    for text in reversed(re.findall(r"\[[^\[\]]*\]", reply)):
        try:
            return [float(x) for x in ast.literal_eval(text)]
        except (ValueError, SyntaxError, TypeError):
            continue
    return None


def score(prediction: str, sample: Sample) -> float:
    """1.0 when the extracted answer equals the reference: same option, same integer, same number when rounded to the
    precision asked for, same list."""
    if sample.choices:
        return float(choice_letter(prediction, sample.choices) == sample.answer)
    kind = sample.info["answer_type"]
    if kind == "list":
        said = extract_list(prediction)
        return float(said is not None and said == extract_list(sample.answer))
    if kind == "text":
        return exact_match(prediction, sample.answer)
    number, true = extract_number(prediction), float(sample.answer)
    if number is None:
        return 0.0
    if kind == "integer":
        return float(int(number) == int(true))
    places = int(sample.info["precision"] or 1)
    return float(round(number, places) == round(true, places))
