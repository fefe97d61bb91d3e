"""What all commands share: flags, or a file that holds them, and errors that fit on a line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from transformers import HfArgumentParser

DEBUG = "--debug"
Config = TypeVar("Config")


def parser_of(config: type[Config], description: str | None) -> HfArgumentParser:
    """Make the parser of a config class; the first line of ``description`` is shown by --help."""
    parser = HfArgumentParser(config, description=(description or "").split("\n")[0])
    parser.add_argument(DEBUG, action="store_true", help="show the traceback of an error")
    return parser


def parse(config: type[Config], description: str | None, arguments: list[str]) -> Config:
    """Read flags, or the one YAML or JSON file that holds them.

    Raises:
        ValueError: a value that does not fit, or an unknown key of the file; flags exit with code 2.
    """
    parser = parser_of(config, description)
    if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(arguments[0])[0]
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        return parser.parse_json_file(arguments[0])[0]
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
