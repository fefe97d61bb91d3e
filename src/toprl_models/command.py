"""What the package's commands share."""

from __future__ import annotations

import argparse


def parser_of(module: str, text: str | None) -> argparse.ArgumentParser:
    """Make the parser of ``python -m toprl_models.MODULE``; its help is ``text``, the module's docstring."""
    summary, _, rest = (text or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m toprl_models.{module}",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
