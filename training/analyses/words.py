"""Markdown and English."""

from __future__ import annotations

from collections.abc import Sequence


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table whose first columns hold text and the others numbers."""
    marks = ["---" if i < text_columns else "--:" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, marks, *rows))


def plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
