"""Every metric on cases worked out by hand, and against the libraries that have it."""

from __future__ import annotations

import math
import random
import shutil

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from training import metrics
from training.captions import CiderD, check_tokenizer, cider, corpus_bleu, sentence_bleu, tokenize_ptb, tokenize_simple

REPEATABLE = settings(deadline=None, derandomize=True)  # the same examples each time, however busy the machine is


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        (" Yes. ", "yes", 1),
        ('"a  Dog"', "A dog", 1),
        ("yes", "no", 0),
        ("", "no", 0),
        ("5", "-5", 0),  # a sign is no punctuation
        ("3.5", "35", 0),
        ("t-shirt", "t shirt", 0),
    ],
)
def test_exact_match(prediction, answer, score):
    assert metrics.exact_match(prediction, answer) == score


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Dog", "dog"),
        ("An apple a day", "apple day"),
        ("two", "2"),
        ("None", "0"),
        ("ten dogs.", "10 dogs"),
        ("eleven", "eleven"),
        ("1,000", "1000"),  # commas vanish
        ("3.5", "3.5"),  # a full stop before a digit stays
        ("5.", "5"),
        ("U.S.A.", "usa"),
        ("red/white", "red white"),  # punctuation between letters becomes a space ...
        ("red / white", "red white"),  # ... beside a space it vanishes
        ("it is (b)", "it is b"),
        ("t-shirt", "t shirt"),
        ("dont", "don't"),
        ("wouldnt've", "wouldn't've"),
        ("wouldn'tve", "wouldn't've"),
        ("twas", "'twas"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),  # an entry of the reference that goes the other way
        ("ids", "ids"),
        ("dog's", "dog 's"),
        ("yes\n", "yes"),
        ("what?", "what"),
        ("", ""),
    ],
)
def test_vqa_normalisation(text, normalised):
    assert metrics.vqa_normalise(text) == normalised


def test_vqa_accuracy():
    answers = ["cat"] * 4 + ["dog"] * 3 + ["a dog"] + ["two"] + ["cow"]
    # cat: the 4 who said it see 3 others, the 6 who did not see 4: all 1
    assert metrics.vqa_accuracy("Cat.", answers) == 1
    # 2: who said it sees no other one, nine see one: 9 * 1/3 / 10
    assert metrics.vqa_accuracy("2", answers) == pytest.approx(0.3)
    assert metrics.vqa_accuracy("horse", answers) == 0
    # three of ten: those three see two others (2/3), seven see three (1): (3 * 2/3 + 7) / 10
    assert metrics.vqa_accuracy("x", ["x"] * 3 + ["y"] * 7) == pytest.approx(0.9)
    # two of ten: two see one (1/3), eight see two (2/3): (2/3 + 16/3) / 10
    assert metrics.vqa_accuracy("x", ["x"] * 2 + ["y"] * 8) == pytest.approx(0.6)


def test_normalised_match():
    assert metrics.normalised_match("The two.", ["three", "2"]) == 1
    assert metrics.normalised_match("twelve", ["12"]) == 0


OPTIONS = ["red", "dark red", "blue", "A red car"]


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(c)", "C"),
        ("Dark red", "B"),
        ("a red car", "D"),  # the whole text comes before the "A" in it
        ("The answer is C.", "C"),
        ("C. blue", "C"),
        ("**D**", "D"),
        ("Answer:B", "B"),
        ("it is blue", "C"),
        ("it is dark red", "B"),  # "red" is only part of it
        ("blue or red", None),
        ("E", None),
        ("I do not know", None),
        ("T-shirt", None),
        ("", None),
    ],
)
def test_choice(reply, letter):
    assert metrics.choice_letter(reply, OPTIONS) == letter
    for other in "ABCD":
        assert metrics.choice(reply, other, OPTIONS) == (other == letter)


def test_options_that_are_letters_themselves():
    """The prompt asks for the letter before the option, so "A" is the first one."""
    assert metrics.choice_letter("A", ["C", "A", "B"]) == "A"
    assert metrics.choice_letter("same", ["same", "same"]) is None


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("Yes, there is no doubt.", "yes"),
        ("There is no cat.", "no"),
        ("I think yes", "yes"),
        ("There is a cat", "other"),
        ("maybe yes or no", "other"),
        ("nothing", "other"),
        ("", "other"),
    ],
)
def test_yes_no(reply, said):
    assert metrics.yes_no(reply) == said
    assert metrics.correct_yes_no(reply, "yes") == (said == "yes")


def test_f1_by_hand():
    said = ["yes", "yes", "yes", "no", "no", "hm"]
    true = ["yes", "yes", "no", "yes", "no", "no"]
    result = metrics.f1_yes(said, true)
    assert result["precision"] == pytest.approx(2 / 3)
    assert result["recall"] == pytest.approx(2 / 3)
    assert result["f1"] == pytest.approx(2 / 3)
    assert result["accuracy"] == pytest.approx(3 / 6)
    assert result["unparsed_ratio"] == pytest.approx(1 / 6)


def test_yes_ratio_is_of_the_answers():
    """A model that always says yes: the labels are balanced, its answers are not."""
    result = metrics.f1_yes(["yes"] * 4, ["yes", "no", "yes", "no"])
    assert result["yes_ratio"] == 1
    assert result["f1"] == pytest.approx(2 / 3)
    assert metrics.f1_yes(["no"] * 4, ["yes", "no"] * 2)["f1"] == 0


@REPEATABLE
@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no"])), min_size=1, max_size=30))
def test_f1_against_scikit_learn(pairs):
    said, true = zip(*pairs, strict=True)
    ours = metrics.f1_yes(said, true)
    arguments = {"y_true": true, "y_pred": said, "pos_label": "yes", "zero_division": 0}
    assert ours["f1"] == pytest.approx(f1_score(**arguments))
    assert ours["precision"] == pytest.approx(precision_score(**arguments))
    assert ours["recall"] == pytest.approx(recall_score(**arguments))
    assert ours["accuracy"] == pytest.approx(accuracy_score(true, said))


def test_mme():
    correct = [1, 1, 1, 0, 0, 1, 1, 1]
    categories = ["OCR"] * 4 + ["OCR"] * 2 + ["code_reasoning"] * 2
    ids = ["a", "a", "b", "b", "c", "c", "a", "a"]  # ids repeat across categories
    result = metrics.mme(correct, categories, ids)
    assert result["accuracy"] == pytest.approx(6 / 8)
    assert result["accuracy_plus"] == pytest.approx(2 / 4)
    assert result["accuracy/OCR"] == pytest.approx(4 / 6)
    assert result["accuracy_plus/OCR"] == pytest.approx(1 / 3)
    assert result["perception"] == pytest.approx(100)
    assert result["cognition"] == pytest.approx(200)
    with pytest.raises(ValueError, match="OCR b has 1 questions"):
        metrics.mme([1], ["OCR"], ["b"])


@pytest.mark.parametrize(
    ("reply", "box"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("The box of the 2 men is [0,.5, 1, 1.0].", (0, 0.5, 1, 1)),
        ("0.1 0.2 0.3 0.4", (0.1, 0.2, 0.3, 0.4)),
        ("[-0.1, 0.2, 0.3, 0.4]", (-0.1, 0.2, 0.3, 0.4)),
        ("2 men: 0.1 0.2 0.3 0.4", None),  # five numbers: which ones?
        ("[0.1, 0.2, 0.3]", None),
        ("on the left", None),
    ],
)
def test_parse_box(reply, box):
    assert metrics.parse_box(reply) == box


def test_iou():
    assert metrics.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert metrics.iou((0, 0, 1, 1), (0, 0, 1, 0.5)) == pytest.approx(0.5)
    assert metrics.iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert metrics.iou((1, 1, 0, 0), (0, 0, 1, 1)) == 0  # corners in the wrong order
    assert metrics.box_iou("[0, 0, 1, 0.5]", (0, 0, 1, 1)) == pytest.approx(0.5)
    assert metrics.box_iou("none", (0, 0, 1, 1)) == 0


BOXES = st.tuples(*[st.floats(0, 1)] * 4)


@REPEATABLE
@given(BOXES, BOXES)
def test_iou_is_symmetric_and_a_share(first, second):
    value = metrics.iou(first, second)
    assert 0 <= value <= 1 + 1e-9
    assert value == pytest.approx(metrics.iou(second, first))


def test_edit_distance_and_anls():
    assert metrics.edit_distance("kitten", "sitting") == 3
    assert metrics.edit_distance("", "abc") == 3
    assert metrics.anls("Hello World", ["hello world"]) == 1
    assert metrics.anls("helo", ["hello", "x"]) == pytest.approx(1 - 1 / 5)
    assert metrics.anls("abcd", ["abxy"]) == 0  # half of the letters differ: not similar
    assert metrics.anls("abcd", ["abcx", "abcd"]) == 1
    assert metrics.anls("", ["abc"]) == 0


@REPEATABLE
@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_a_metric(a, b, c):
    distance = metrics.edit_distance
    assert distance(a, b) == distance(b, a)
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, c) <= distance(a, b) + distance(b, c)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("104.9", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("50%", "0.5", 1),
        ("50%", "50", 0),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("about 100", "100", 0),
        ("Yes.", "yes", 1),
        ("2019", "2020", 1),
    ],
)
def test_relaxed_accuracy(prediction, answer, score):
    assert metrics.relaxed_accuracy(prediction, [answer]) == score
    assert metrics.relaxed_accuracy(prediction, ["something else", answer]) == score


# --- captions ---


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's dog doesn't run; it can't!", "a man 's dog does n't run it ca n't"),
        ("The boys' ball, $3.50 & 50% off.", "the boys ball $ 3.50 & 50 % off"),
        ("It's 5 o'clock. She'd've gone", "it 's 5 o'clock she 'd 've gone"),
        ("A red/white T-shirt for 1,000 people", "a red/white t-shirt for 1,000 people"),
        ("Don’t use “curly” quotes…", "do n't use curly quotes"),
        ("", ""),
    ],
)
def test_simple_tokenizer_splits_as_ptb_does(caption, words):
    """The words are what the PTB tokenizer gave; where Java is installed it is asked again."""
    assert tokenize_simple(caption) == words
    if shutil.which("java"):
        assert tokenize_ptb([caption]) == [words]


def test_ptb_or_a_clear_refusal():
    if not shutil.which("java"):
        with pytest.raises(RuntimeError, match="install Java"):
            check_tokenizer("ptb")
        return
    check_tokenizer("ptb")
    # empty captions and strange line ends neither vanish nor shift the others; "(" is where the two differ
    lines = ["", "a\u2028dog", "\n", "the cat (black)", "."]
    assert tokenize_ptb(lines) == ["", "a dog", "", "the cat -lrb- black -rrb-", ""]


def test_without_java_nothing_is_silent(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r'install Java, or pass caption_tokenizer="simple".*or metric="bleu"'):
        check_tokenizer("ptb")
    check_tokenizer("simple")
    with pytest.raises(ValueError, match="caption_tokenizer='nltk'"):
        check_tokenizer("nltk")
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    for captions_given in (["a dog"], ["a dog", "a cat"]):
        with pytest.raises(RuntimeError, match=r"PTB tokenizer .* failed"):
            tokenize_ptb(captions_given)


def test_cider_by_hand():
    """Two images, one reference each. "a" is in both: weight log(2/2) = 0. Every other n-gram weighs log 2."""
    scorer = CiderD([["a dog"], ["a cat"]])
    # unigrams: (a, dog) against itself 1; bigram "a dog" 1; no 3- or 4-grams: (1 + 1 + 0 + 0) / 4 * 10
    assert scorer.score("a dog", ["a dog"]) == pytest.approx(5)
    # "dog": unigram cosine 1, no bigram; one bigram less: exp(-1 / 72)
    assert scorer.score("dog", ["a dog"]) == pytest.approx(10 / 4 * math.exp(-1 / 72))
    # "dog dog": its unigram weight is 2 log 2, clipped to log 2: log2^2 / (2 log2 * log2) = 1/2; bigram unknown
    assert scorer.score("dog dog", ["a dog"]) == pytest.approx(10 / 4 / 2)
    assert scorer.score("", ["a dog"]) == 0
    assert scorer.score("a dog", ["a dog", "a cat"]) == pytest.approx(2.5)
    with pytest.raises(ValueError, match="at least 2"):
        CiderD([["a dog"]])


@pytest.mark.parametrize("seed", range(5))
def test_cider_against_pycocoevalcap(seed):
    rng = random.Random(seed)
    words = "a man dog red is running in the park with ball two".split()

    def caption(least: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(least, 12)))

    references = [[caption(1) for _ in range(rng.randint(1, 5))] for _ in range(20)]
    predictions = [caption(0) for _ in range(20)]
    mean, single = Cider().compute_score(dict(enumerate(references)), {i: [p] for i, p in enumerate(predictions)})
    scorer = CiderD(references)
    assert [scorer.score(p, r) for p, r in zip(predictions, references, strict=True)] == pytest.approx(single, abs=1e-9)
    assert cider(predictions, references, "simple") == pytest.approx(mean, abs=1e-9)
    assert mean > 0.1


def test_bleu():
    assert sentence_bleu("a dog runs in the park", ["A dog runs in the park"]) == 1
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples; no 4-gram, which sacrebleu smooths to 1/2
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert sentence_bleu("the big dog ran", ["the big dog sat"]) == pytest.approx(expected, abs=1e-6)
    assert sentence_bleu("zebra", ["a dog runs"]) == 0
    # a caption shorter than four words can be perfect
    assert sentence_bleu("a dog", ["a dog"]) == 1


def test_corpus_bleu_with_different_numbers_of_references():
    predictions = ["a dog runs in a park", "two men play ball"]
    references = [["a dog runs in the park"], ["two men play ball", "men playing", "a game of ball"]]
    same = [["a dog runs in the park"] * 3, references[1]]
    streams = [list(column) for column in zip(*same, strict=True)]
    expected = sacrebleu.corpus_bleu(predictions, streams, lowercase=True).score / 100
    assert corpus_bleu(predictions, references) == pytest.approx(expected)
    assert 0.5 < expected < 1
    # not the mean of the sentences
    mean = sum(sentence_bleu(p, r) for p, r in zip(predictions, references, strict=True)) / 2
    assert abs(mean - expected) > 0.01
