"""Make docstrings readable by mkdocstrings: examples as code, and names instead of Sphinx roles."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrite the text of every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename "Example:", which would be prose, and unwrap ``:func:`name```."""
        if obj.docstring is not None:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = re.sub(r":(?:func|class|mod|meth):`~?([^`]*)`", r"`\1`", text)
