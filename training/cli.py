"""What all commands share: flags, or a file that holds them, and errors that fit on a line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import yaml
from transformers import HfArgumentParser

DEBUG = "--debug"
Config = TypeVar("Config")


def parser_of(config: type[Config], description: str | None) -> HfArgumentParser:
    """Make the parser of a config class; the first line of ``description`` is shown by --help."""
    parser = HfArgumentParser(config, description=(description or "").split("\n")[0])
    parser.add_argument(DEBUG, action="store_true", help="show the traceback of an error")
    return parser


def parse(config: type[Config], description: str | None, arguments: list[str]) -> Config:
    """Read flags; a YAML or JSON file in front of them holds others, which they overrule.

    Raises:
        ValueError: a value that does not fit, or an unknown key of the file; flags exit with code 2.
        OSError: the file cannot be read.
    """
    parser = parser_of(config, description)
    if arguments and arguments[0].endswith((".yaml", ".yml", ".json")):
        file, *arguments = arguments
        values = yaml.safe_load(Path(file).read_text())
        known = {field.name for field in fields(config)}  # type: ignore[arg-type]
        if not isinstance(values, dict) or set(values) - known:
            unknown = ", ".join(sorted(set(values) - known)) if isinstance(values, dict) else "no list of flags"
            raise ValueError(f"{file}: {unknown}: a line needs the name of a flag and its value; --help lists them")
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(arguments)[0]


def run(main: Callable[[list[str]], object]) -> None:
    """Call ``main`` with the command line; an error is one line and exit code 1, with --debug its traceback too."""
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    try:
        main(arguments)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if len(arguments) < len(sys.argv) - 1:
            raise
        sys.exit(f"error: {' '.join(str(error).split())} ({DEBUG} shows the traceback)")
