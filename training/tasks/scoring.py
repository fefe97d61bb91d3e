"""The metrics by name: score of one sample in [0, 1], and numbers of a corpus whose first one is the headline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from training import captions, metrics
from training.tasks import mathvista
from training.tasks.base import Sample
from training.tasks.loading import need

Score = Callable[[str, Sample], float]


@dataclass
class Metric:
    """A metric whose corpus number is the mean of its scores, called ``headline``."""

    name: str
    function: Score
    headline: str = "accuracy"

    def score(self, prediction: str, sample: Sample) -> float:
        return self.function(prediction, sample)

    def corpus(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        scores = [self.score(p, s) for p, s in zip(predictions, samples, strict=True)]
        return {self.headline: sum(scores) / len(scores)}


class YesNo(Metric):
    """POPE: F1 and friends, and F1 of each category where samples have one."""

    def corpus(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        result = metrics.f1_yes(predictions, [s.answer for s in samples])
        for category in sorted({s.info["category"] for s in samples if "category" in s.info}):
            rows = [i for i, s in enumerate(samples) if s.info.get("category") == category]
            part = metrics.f1_yes([predictions[i] for i in rows], [samples[i].answer for i in rows])
            result[f"f1/{category}"] = part["f1"]
        return result


class Mme(Metric):
    """MME: accuracy, accuracy+ and the sums that its leaderboard prints."""

    def corpus(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        correct = [self.score(p, s) for p, s in zip(predictions, samples, strict=True)]
        return metrics.mme(correct, [s.info["category"] for s in samples], [s.info["id"] for s in samples])


class Boxes(Metric):
    """Grounding: the score is the intersection over union, the headline the share with at least 0.5."""

    def corpus(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        scores = [self.score(p, s) for p, s in zip(predictions, samples, strict=True)]
        return {
            "acc@0.5": sum(score >= 0.5 for score in scores) / len(scores),
            "mean_iou": sum(scores) / len(scores),
            "unparsed_ratio": sum(metrics.parse_box(p) is None for p in predictions) / len(scores),
        }


class Bleu(Metric):
    """BLEU-4; the corpus number is not the mean of the scores."""

    def corpus(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        return {"bleu4": captions.corpus_bleu(predictions, [s.references for s in samples])}


class Cider(Metric):
    """CIDEr-D.

    The score of a sample is CIDEr-D / 10, with word weights from ``references`` (those of the task's samples) and the
    simple tokenizer: a reward cannot wait for a Java process. The corpus number takes its weights from the samples
    scored, as is usual, and the tokenizer asked for.
    """

    def __init__(self, references: Callable[[], list[Sequence[str]]], tokenizer: str) -> None:
        super().__init__("cider", self._score, "cider" if tokenizer == "ptb" else "cider_simple_tokenizer")
        self.references, self.tokenizer = references, tokenizer
        self._scorer: captions.CiderD | None = None

    def _score(self, prediction: str, sample: Sample) -> float:
        if self._scorer is None:
            self._scorer = captions.CiderD([captions.tokenize(texts, "simple") for texts in self.references()])
        said, *references = captions.tokenize([prediction, *sample.references], "simple")
        return min(1.0, self._scorer.score(said, references) / 10)

    def corpus(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        return {self.headline: captions.cider(predictions, [s.references for s in samples], self.tokenizer)}


def _best(function: Callable[[str, str], float]) -> Score:
    return lambda prediction, sample: max(function(prediction, answer) for answer in sample.references)


def _box(prediction: str, sample: Sample) -> float:
    assert sample.bbox is not None
    return metrics.box_iou(prediction, sample.bbox)


METRICS: dict[str, Callable[[str], Metric]] = {
    "exact_match": lambda name: Metric(name, _best(metrics.exact_match)),
    "vqa_accuracy": lambda name: Metric(name, lambda p, s: metrics.vqa_accuracy(p, s.answers), "vqa_accuracy"),
    "choice": lambda name: Metric(name, lambda p, s: metrics.choice(p, s.answer, s.choices)),
    "f1_yes": lambda name: YesNo(name, lambda p, s: metrics.correct_yes_no(p, s.answer)),
    "iou": lambda name: Boxes(name, _box),
    "anls": lambda name: Metric(name, lambda p, s: metrics.anls(p, s.references), "anls"),
    "relaxed_accuracy": lambda name: Metric(
        name, lambda p, s: metrics.relaxed_accuracy(p, s.references), "relaxed_accuracy"
    ),
    "bleu": lambda name: Bleu(name, lambda p, s: captions.sentence_bleu(p, s.references)),
    "mme": lambda name: Mme(name, lambda p, s: metrics.correct_yes_no(p, s.answer)),
    "normalised_match": lambda name: Metric(
        name, lambda p, s: metrics.normalised_match(p, s.references), "accuracy_judge_free"
    ),
    "mathvista": lambda name: Metric(name, mathvista.score, "accuracy_rule_based"),
}
# what a data set of one's own can be scored with
CUSTOM_METRICS = (
    "exact_match",
    "vqa_accuracy",
    "choice",
    "f1_yes",
    "iou",
    "anls",
    "relaxed_accuracy",
    "bleu",
    "cider",
)


def make_metric(name: str, references: Callable[[], list[Sequence[str]]], caption_tokenizer: str) -> Metric:
    """The metric called ``name``; what it needs is checked now rather than after an evaluation.

    Raises:
        ValueError: unknown tokenizer.
        ImportError, RuntimeError: a package or Java is missing.
    """
    if name == "cider":
        captions.check_tokenizer(caption_tokenizer)
        return Cider(references, caption_tokenizer)
    if name == "bleu":
        need("sacrebleu", "metric='bleu'")
    return METRICS[name](name)
