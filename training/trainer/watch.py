"""Notices that a training run has gone wrong, and says in which way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from training.trainer.checkpoint import checkpoints
from training.trainer.config import PPOConfig
from training.trainer.log import flat
from training.trainer.validation import standing

WINDOW = 5  # iterations that a collapse has to last


class NotFiniteError(RuntimeError):
    """NaN or infinity where a number is needed; the weights are as before the step that would have used it."""


class CollapseError(RuntimeError):
    """--on_collapse stop: the policy has collapsed."""


def require_finite(**tensors: Tensor) -> None:
    """Raise NotFiniteError with the names of the tensors that hold NaN or infinity."""
    bad = {name: (~tensor.isfinite()).sum().item() for name, tensor in tensors.items() if not tensor.isfinite().all()}
    if bad:
        found = ", ".join(f"{name} ({count} of {tensors[name].numel()})" for name, count in bad.items())
        raise NotFiniteError(f"NaN or infinity in {found}")


@contextmanager
def naming_checkpoint(folder: Path, iteration: int) -> Iterator[None]:
    """Add to a NotFiniteError where it happened and which checkpoint in ``folder`` to go back to."""
    try:
        yield
    except NotFiniteError as error:
        known = checkpoints(folder)
        last = f"the last good checkpoint is {known[-1]}" if known else "there is no checkpoint yet"
        raise NotFiniteError(
            f"iteration {iteration}: {error}; nothing was updated with it, {last}. Lower --learning_rate, or try "
            "--dtype float32"
        ) from error


class Watch:
    """Names what is wrong with a run from the rows of metrics.jsonl: the same rows, the same findings.

    Args:
        config: ``on_collapse`` says what a finding does; ``iterations`` tells what is early.
        rows: of the iterations already done, when a run goes on.
    """

    def __init__(self, config: PPOConfig, rows: Sequence[dict[str, Any]] = ()) -> None:
        self.config = config
        self.rows: list[dict[str, Any]] = list(rows)
        self._active = set(findings(self.rows, config.iterations))

    def check(self, row: dict[str, Any]) -> list[str]:
        """What begins to be wrong with this iteration, printed as well unless --on_collapse ignore.

        Raises:
            CollapseError: --on_collapse stop, and something is wrong.
        """
        self.rows.append(row)
        found = findings(self.rows, self.config.iterations) if self.config.on_collapse != "ignore" else {}
        new = [
            f"iteration {row['iteration']}: {kind}: {text}" for kind, text in found.items() if kind not in self._active
        ]
        self._active = set(found)
        if new and self.config.on_collapse == "stop":
            raise CollapseError("; ".join(new))
        for text in new:
            print(f"warning: {text}", flush=True)
        return new

    def check_validation(self, row: dict[str, Any]) -> str:
        """Return what is wrong with a validation ("" for nothing), printed as well unless --on_collapse ignore.

        Raises:
            CollapseError: --on_collapse stop, and something is wrong after the first validation.
        """
        if standing(row)[0] or not row["iteration"] or self.config.on_collapse == "ignore":
            return ""
        text = (
            f"iteration {row['iteration']}: accuracy lost: {row['accuracy']:.3f} by arg-max on held-out samples, "
            f"{row['full_accuracy']:.3f} unpruned"
        )
        if self.config.on_collapse == "stop":
            raise CollapseError(text)
        print(f"warning: {text}", flush=True)
        return text


def findings(rows: Sequence[dict[str, Any]], iterations: int) -> dict[str, str]:
    """What is wrong at the last of ``rows``: kind and explanation. See docs/training.md for the kinds."""
    if not rows:
        return {}
    row, found = rows[-1], {}
    bad = [name for name, value in flat(row).items() if not math.isfinite(value)]
    if bad:
        found["not finite"] = f"NaN or infinity in {', '.join(bad)}"
    last = rows[-WINDOW:]
    if len(last) == WINDOW:
        found |= _collapse(last, max(row["accuracy"] for row in rows))
    if min(row.get("advantage_std", 1.0), row.get("reward_std", 1.0)) < 1e-6:
        found["zero advantage"] = "all episodes of the rollout are equally good, so that nothing can be learned"
    if row["entropy"] < 0.05 and row["iteration"] < iterations / 2:
        found["entropy gone"] = f"entropy is {row['entropy']:.4f} nats in the first half: exploration has ended"
    if row["ratio_max"] > 10 or row["kl_k3"] > 0.5:
        found["update too large"] = f"largest ratio {row['ratio_max']:.1f}, KL {row['kl_k3']:.2f}"
    return found


def _collapse(last: Sequence[dict[str, Any]], best: float) -> dict[str, str]:
    """Findings that have to last."""
    kept = [row["retained"][-1] for row in last]
    accuracy = max(row["accuracy"] for row in last)
    if max(kept) < 0.05 and accuracy < 0.7 * best:
        return {"keep-none": f"{max(kept):.3f} of the tokens are left, accuracy fell from {best:.3f} to {accuracy:.3f}"}
    if min(kept) > 0.98:
        return {"keep-all": f"{min(kept):.3f} of the tokens are left behind the last stage for {WINDOW} iterations"}
    return {}
