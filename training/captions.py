"""Caption scores: BLEU-4 (sacrebleu) and CIDEr-D, and the two ways of splitting a caption into words."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import Any

TOKENIZERS = ("ptb", "simple")
_ENCLITICS = re.compile(r"(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
_WORDS = re.compile(r"n't|'\w+|(?:\w+(?:[-/.,'&]\w+)*)|[$%&@#]")


def check_tokenizer(tokenizer: str) -> None:
    """Raise where ``tokenizer`` cannot run.

    Raises:
        ValueError: unknown name.
        RuntimeError: "ptb" without Java or pycocoevalcap.
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"caption_tokenizer={tokenizer!r} must be one of {TOKENIZERS}")
    if tokenizer == "ptb":
        fix = 'or pass caption_tokenizer="simple" (close, but not comparable with published CIDEr) or metric="bleu"'
        if shutil.which("java") is None:
            raise RuntimeError(f'caption_tokenizer="ptb": the PTB tokenizer of CIDEr runs on Java; install Java, {fix}')
        try:
            import pycocoevalcap  # noqa: F401
        except ImportError as error:
            raise RuntimeError(
                f"caption_tokenizer=\"ptb\" needs pycocoevalcap: pip install 'toprl-kernels[eval]', {fix}"
            ) from error


def tokenize_simple(caption: str) -> str:
    """Lower-case words as the PTB tokenizer splits common captions: "a man's dog" -> "a man 's dog", no punctuation."""
    text = caption.lower().replace("’", "'").replace("cannot", "can not")
    return " ".join(_WORDS.findall(_ENCLITICS.sub(r" \1", text)))


def tokenize_ptb(captions: Sequence[str]) -> list[str]:
    """The captions through pycocoevalcap's PTB tokenizer, one Java process for all of them.

    Raises:
        RuntimeError: Java failed; its own message is on stderr. (The library itself would go on with fewer captions.)
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # one caption is one line of Java's input, which breaks lines at more characters than "\n"
    lines = [" ".join(caption.split()) for caption in captions]
    spoken = {i: [{"caption": line}] for i, line in enumerate(lines) if line}
    done = PTBTokenizer().tokenize(spoken) if spoken else {}
    nothing = not any(words for (words,) in done.values())  # what is left of one caption when Java dies
    if len(done) != len(spoken) or (nothing and any(map(tokenize_simple, lines))):
        raise RuntimeError('the PTB tokenizer (Java) failed; repair Java or pass caption_tokenizer="simple"')
    return [done[i][0] if i in done else "" for i in range(len(lines))]


def tokenize(captions: Sequence[str], tokenizer: str) -> list[str]:
    """Captions as words with single spaces between them."""
    return tokenize_ptb(captions) if tokenizer == "ptb" else [tokenize_simple(c) for c in captions]


class CiderD:
    """CIDEr-D with document frequencies of a fixed corpus, so that single captions can be scored.

    Args:
        corpus: the tokenized references of each image.

    Raises:
        ValueError: fewer than two images - every word would weigh log(1) = 0.
    """

    ORDER, SIGMA = 4, 6.0

    def __init__(self, corpus: Sequence[Sequence[str]]) -> None:
        if len(corpus) < 2:
            raise ValueError(f"cider: {len(corpus)} image(s); word weights need the references of at least 2")
        self.document_frequency: Counter[tuple[str, ...]] = Counter()
        for references in corpus:
            self.document_frequency.update({ngram for text in references for ngram in self._ngrams(text)})
        self.log_images = math.log(len(corpus))

    def score(self, candidate: str, references: Sequence[str]) -> float:
        """CIDEr-D of a tokenized caption, in [0, 10]."""
        return 10 * sum(self._similarity(candidate, text) for text in references) / len(references)

    def _ngrams(self, text: str) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for n in range(1, self.ORDER + 1) for i in range(len(words) - n + 1))

    def _vector(self, text: str) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """The tf-idf weights of each order, their norms, and the number of words."""
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(self.ORDER)]
        for ngram, count in self._ngrams(text).items():
            rarity = self.log_images - math.log(max(1, self.document_frequency[ngram]))
            weights[len(ngram) - 1][ngram] = count * rarity
        norms = [math.sqrt(sum(w * w for w in order.values())) for order in weights]
        return weights, norms, len(text.split())

    def _similarity(self, candidate: str, reference: str) -> float:
        ours, our_norms, our_length = self._vector(candidate)
        theirs, their_norms, their_length = self._vector(reference)
        total = 0.0
        for a, b, norm_a, norm_b in zip(ours, theirs, our_norms, their_norms, strict=True):
            if norm_a and norm_b:  # clipped: repeating a word earns nothing
                total += sum(min(w, b[n]) * b[n] for n, w in a.items() if n in b) / (norm_a * norm_b)
        return total / self.ORDER * math.exp(-((our_length - their_length) ** 2) / (2 * self.SIGMA**2))


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str) -> float:
    """Corpus CIDEr-D in [0, 10]: the mean over images; papers print 100 times this."""
    flat = tokenize([*predictions, *(text for texts in references for text in texts)], tokenizer)
    said, rest = flat[: len(predictions)], iter(flat[len(predictions) :])
    corpus = [[next(rest) for _ in texts] for texts in references]
    scorer = CiderD(corpus)
    return sum(scorer.score(text, texts) for text, texts in zip(said, corpus, strict=True)) / len(said)


def sentence_bleu(prediction: str, references: Sequence[str]) -> float:
    """BLEU-4 of one caption in [0, 1] (sacrebleu, lower-cased; orders that a short caption lacks are left out)."""
    import sacrebleu

    return min(1.0, sacrebleu.sentence_bleu(prediction, list(references), lowercase=True).score / 100)


def corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 in [0, 1] (sacrebleu, lower-cased); the images may have different numbers of references."""
    import sacrebleu

    most = max(map(len, references))
    # None, unlike "", is no reference at all
    streams: Any = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    return min(1.0, sacrebleu.corpus_bleu(list(predictions), streams, lowercase=True).score / 100)
