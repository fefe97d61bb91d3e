"""Scores of answers, each in [0, 1] and dense enough for a reward, and the corpus numbers of the benchmarks.

Everything here is a pure function of strings and numbers; captions (BLEU, CIDEr-D) are in training/captions.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

EDGES = " \t\r\n.,!?:;\"'()"
Box = tuple[float, float, float, float]


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation at the two ends; signs and points inside numbers stay."""
    return " ".join(text.lower().split()).strip(EDGES)


def exact_match(prediction: str, answer: str) -> float:
    """1.0 when the two are equal up to case, spaces and punctuation at their ends (so "-5" is not "5")."""
    return float(normalise(prediction) == normalise(answer))


# --- VQA accuracy ---

# The words whose missing apostrophe EvalAI puts back; it also knows each doubly contracted word with one of the two
# missing. Left out are its capitalised entries, which can never match lower-cased text.
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
""".split()
NUMBERS = "zero one two three four five six seven eight nine ten".split()
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def _without_one_apostrophe(word: str) -> list[str]:
    """The spellings of ``word`` with any one apostrophe missing."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {wrong: right for right in CONTRACTED for wrong in _without_one_apostrophe(right)}
# the reference's one entry that goes the other way, and its spellings of 'ow's'at
CONTRACTIONS |= {"somebody'd": "somebodyd"} | dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}


@lru_cache(maxsize=65536)
def vqa_normalise(text: str) -> str:
    """EvalAI's normalisation: case, punctuation, number words, articles, contractions - quirks included.

    A punctuation mark with a space beside it anywhere in the answer vanishes; otherwise it becomes a space. A full stop
    goes unless a digit follows.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = [DIGITS.get(word, word) for word in cleaned.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, matches among the others / 3), after ``vqa_normalise``.

    With fewer than four annotators not even a perfect answer scores 1.
    """
    said, given = vqa_normalise(prediction), [vqa_normalise(a) for a in answers]
    matches = given.count(said)
    # an annotator who gave the answer is left out of its own count
    return sum(min(1.0, (matches - (one == said)) / 3) for one in given) / len(given)


def normalised_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the prediction equals one of the answers after ``vqa_normalise``."""
    return float(vqa_normalise(prediction) in {vqa_normalise(a) for a in answers})


# --- choices ---


def choice_letter(prediction: str, choices: Sequence[str]) -> str | None:
    """The option that the reply names: its letter ("A" is the first choice), or None.

    In this order: the reply is a letter only (any case), the reply is the text of one option, the first standalone
    capital letter of an option, the only option whose text occurs in the reply.
    """
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    alone = re.fullmatch(r"\W*([A-Za-z])\W*", prediction)
    if alone and alone[1].upper() in letters:
        return alone[1].upper()
    said, texts = normalise(prediction), [normalise(c) for c in choices]
    if texts.count(said) == 1:
        return letters[texts.index(said)]
    first = re.search(rf"(?<![\w'’-])[A-{letters[-1]}](?![\w'’-])", prediction)
    if first:
        return first[0]
    found = [text for text in texts if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", said)]
    found = [text for text in found if not any(text != other and text in other for other in found)]
    return letters[texts.index(found[0])] if len(found) == 1 and texts.count(found[0]) == 1 else None


def choice(prediction: str, answer: str, choices: Sequence[str]) -> float:
    """1.0 when the reply names the option with the letter ``answer``."""
    return float(choice_letter(prediction, choices) == answer)


# --- yes or no ---


def yes_no(text: str) -> str:
    """ "yes", "no" or "other": the first word if it is one of them, else the only one of the two that occurs."""
    words = re.findall(r"[a-z']+", text.lower())
    if words and words[0] in ("yes", "no"):
        return words[0]
    said = {word for word in words if word in ("yes", "no")}
    return said.pop() if len(said) == 1 else "other"


def correct_yes_no(prediction: str, answer: str) -> float:
    """1.0 when both say yes or both say no; a reply that says neither is wrong."""
    return float(yes_no(prediction) == yes_no(answer))


def f1_yes(predictions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """POPE's numbers with "yes" as the positive class: F1, accuracy, precision, recall.

    ``yes_ratio`` is the share of yes among what the *model* said (a model that always says yes has 1), and
    ``unparsed_ratio`` that of replies which say neither.
    """
    said, true = [yes_no(p) for p in predictions], [yes_no(a) for a in answers]
    pairs = list(zip(said, true, strict=True))
    hits = pairs.count(("yes", "yes"))
    precision = hits / said.count("yes") if "yes" in said else 0.0
    recall = hits / true.count("yes") if "yes" in true else 0.0
    return {
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "accuracy": sum(s == t for s, t in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "yes_ratio": said.count("yes") / len(said),
        "unparsed_ratio": said.count("other") / len(said),
    }


MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme(correct: Sequence[float], categories: Sequence[str], question_ids: Sequence[str]) -> dict[str, float]:
    """MME: accuracy over questions, accuracy+ over images (both of an image's two questions right).

    ``perception`` and ``cognition`` are the sums over their categories of 100 (accuracy + accuracy+), at most 2000 and
    800 on the whole set.

    Raises:
        ValueError: an image does not have exactly two questions.
    """
    images: dict[tuple[str, str], list[float]] = defaultdict(list)
    for score, category, question_id in zip(correct, categories, question_ids, strict=True):
        images[category, question_id].append(score)
    per_category: dict[str, list[list[float]]] = defaultdict(list)
    for (category, question_id), scores in images.items():
        if len(scores) != 2:
            raise ValueError(f"mme: {category} {question_id} has {len(scores)} questions, accuracy+ needs exactly 2")
        per_category[category].append(scores)
    result = {
        "accuracy": sum(correct) / len(correct),
        "accuracy_plus": sum(min(scores) for scores in images.values()) / len(images),
        "perception": 0.0,
        "cognition": 0.0,
    }
    for category, pairs in sorted(per_category.items()):
        accuracy = sum(map(sum, pairs)) / (2 * len(pairs))
        plus = sum(map(min, pairs)) / len(pairs)
        result |= {f"accuracy/{category}": accuracy, f"accuracy_plus/{category}": plus}
        result["cognition" if category in MME_COGNITION else "perception"] += 100 * (accuracy + plus)
    return result


# --- boxes ---

NUMBER = r"-?(?:\d+\.?\d*|\.\d+)"


def parse_box(text: str) -> Box | None:
    """The first four numbers in square brackets, else the only four numbers of the reply, else None."""
    inside = re.search(rf"\[\s*({NUMBER})\s*,\s*({NUMBER})\s*,\s*({NUMBER})\s*,\s*({NUMBER})\s*\]", text)
    numbers = list(inside.groups()) if inside else re.findall(NUMBER, text)
    if len(numbers) != 4:
        return None
    x1, y1, x2, y2 = map(float, numbers)
    return x1, y1, x2, y2


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 when one of them has no area."""

    def area(box: Box) -> float:
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    if not area(first) or not area(second):
        return 0.0
    shared = area(
        (max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3]))
    )
    return shared / (area(first) + area(second) - shared)


def box_iou(prediction: str, box: Box) -> float:
    """Intersection over union of the box in the reply and ``box``; 0 when the reply has none."""
    said = parse_box(prediction)
    return iou(said, box) if said else 0.0


# --- text and numbers ---


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (letter != other))
    return row[-1]


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity: the best over the answers, 0 from a distance of ``threshold`` on."""
    said = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        true = " ".join(answer.lower().split())
        distance = edit_distance(said, true) / max(len(said), len(true), 1)
        best = max(best, 1 - distance if distance < threshold else 0.0)
    return best


def _number(text: str) -> float | None:
    text = text.strip().rstrip(".")
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """1.0 within 5 % of a number (x% is x / 100), else on an exact match; the best over the answers."""

    def one(answer: str) -> bool:
        said, true = _number(prediction), _number(answer)
        if said is not None and true:
            return abs(said - true) <= tolerance * abs(true)
        return bool(exact_match(prediction, answer))

    return float(any(map(one, answers)))
