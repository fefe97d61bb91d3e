"""List the pruning methods: paper, where they prune, positions, training, families.

python -m toprl_models.methods            # all of them
python -m toprl_models.methods fastv dart # some
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from toprl_models.families import FAMILIES
from toprl_models.registry import BEFORE_LLM, METHODS, Method, method_of
from toprl_models.schedule import PAPER_LAYERS


def row_of(method: Method) -> tuple[str, ...]:
    """Describe a method: name, title, paper, place, positions, training, inputs, families."""
    policy = None if method.trained else method.make()
    layers = ", ".join(map(str, method.stages))
    place = "before the language model" if method.stages == BEFORE_LLM else f"layers {layers} of {PAPER_LAYERS}"
    apply = [family.title for family in FAMILIES.values() if not method.refuses(family)]
    return (
        method.name,
        method.title,
        method.paper,
        place,
        "original" if policy is None else policy.positions,
        "trained" if method.trained else "training-free",
        " and ".join(method.inputs),
        "all families" if len(apply) == len(FAMILIES) else ", ".join(apply),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m toprl_models.methods", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("method", nargs="*", help="names of methods; all where none is given")
    options = parser.parse_args(arguments)
    methods = [method_of(name) for name in options.method] or list(METHODS.values())
    for name, title, paper, places, positions, training, inputs, families in map(row_of, methods):
        print(f"{name}: {title} ({paper})\n  {places}; {positions} positions; {training}; {inputs}\n  {families}")
    print(f"{len(methods)} methods")


if __name__ == "__main__":
    main()
