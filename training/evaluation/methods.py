"""Pruning methods by name, and the policies that --policy names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toprl_models import METHODS as REGISTERED
from toprl_models import Compose, Policy, StageContext, TopRLPolicy, method_of
from toprl_models.methods.toprl import model_signature
from toprl_models.registry import Method
from training.fingerprint import weights_digest
from training.rollout import ArgmaxPolicy


@dataclass(frozen=True)
class Row:
    """One row of the tables.

    Attributes:
        label: for people.
        method: the method of ``toprl_models.METHODS`` that it runs; None for the unpruned model.
        needs_policy: it is made of a trained actor.
        draws: it depends on a seed; others run once (TOP-RL: once per policy).
        scheduled: it keeps what the budget says; others run once for all budgets.
        default: it runs where --method does not say.
    """

    label: str
    method: Method | None = None
    needs_policy: bool = False
    draws: bool = False
    scheduled: bool = True
    default: bool = False


DEFAULTS = ("toprl", "fastv", "fastv_progressive", "pyramiddrop", "random")


def _row(method: Method) -> Row:
    draws = any(part.name == "random" for part in (method, *method.parts))
    return Row(method.title, method, method.trained, draws, default=method.name in DEFAULTS)


_TOPRL = REGISTERED["toprl"]
METHODS = {
    "full": Row("Full model, no pruning", scheduled=False, default=True),
    **{name: _row(method) for name, method in REGISTERED.items()},
    "untrained": Row("Untrained actor", _TOPRL, needs_policy=True, draws=True, default=True),
    "argmax": Row("TOP-RL, arg-max", _TOPRL, needs_policy=True, scheduled=False, default=True),
}


def row_for(name: str) -> Row:
    """Return the row of METHODS, or one for what else ``toprl_models.method_of`` takes: files, compositions, plug-ins.

    Raises:
        ValueError: unknown name.
    """
    if name in METHODS:
        return METHODS[name]
    try:
        return _row(method_of(name))
    except ValueError as error:
        raise ValueError(f"{error}; further rows of the table: full, untrained, argmax") from error


def make_method(
    name: str, model: Any, *, seed: int = 0, policy: TopRLPolicy | None = None, layers: Sequence[int] = ()
) -> Policy | None:
    """Make the policy of the method called ``name``; None is the unpruned model.

    Args:
        seed: of methods that draw.
        policy: the trained actor; "untrained" takes its sizes and stages.
        layers: where it prunes; "oneshot" and compositions need it.

    Raises:
        ValueError: unknown name, or no policy where one is needed.
    """
    row = row_for(name)
    if row.method is None:
        return None
    if not row.needs_policy:
        return _made(row.method, seed, None, tuple(layers))
    if policy is None:
        raise ValueError(f"method {name!r} needs a trained policy: --policy FOLDER")
    if name == "argmax":
        return ArgmaxPolicy(policy)
    return _untrained(policy, model, seed) if name == "untrained" else _made(row.method, seed, policy, tuple(layers))


def _made(method: Method, seed: int, policy: TopRLPolicy | None, layers: tuple[int, ...]) -> Policy:
    """Make the policy as ``Method.make`` does, but let random pruning draw by sample."""
    if method.parts:
        parts = zip(method.parts, layers, strict=True)
        return Compose([_made(part, seed, policy, (layer,)) for part, layer in parts])
    return RandomBySample(seed) if method.name == "random" else method.make(layers, policy)


def name_samples(policy: Policy | None, keys: Sequence[str]) -> None:
    """Tell random pruning, alone or in a composition, which samples come next."""
    for part in policy.policies if isinstance(policy, Compose) else (policy,):
        if isinstance(part, RandomBySample):
            part.keys = keys


def _untrained(policy: TopRLPolicy, model: Any, seed: int) -> TopRLPolicy:
    """The same actor with fresh weights: one that does not beat it has learned nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10_000 + seed)
        size = policy.fc1.out_features
        fresh = TopRLPolicy(
            policy.hidden_size,
            list(policy.stage_layers),
            size,
            model_signature(model),
            condition_on=policy.condition_on,
        )
    return fresh.to(model.device).eval()


class RandomBySample(Policy):
    """Keep tokens uniformly at random; the draw depends on seed, sample and stage alone, not on the batch.

    So a run that was stopped, or that ran on other ranks, gives the same numbers.
    """

    uses_text = False

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.keys: Sequence[str] = ()  # of the batch that comes next

    def score(self, context: StageContext) -> Tensor:
        rows = []
        for key, num_visual in zip(self.keys, context.num_visual, strict=True):
            digest = hashlib.sha256(f"{self.seed}/{context.stage}/{key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            row = torch.zeros(max(max(context.num_visual), 1))
            row[:num_visual] = torch.rand(num_visual, generator=generator)
            rows.append(row)
        return context.of_original(torch.stack(rows).to(context.visual_index.device))


@dataclass(frozen=True)
class Trained:
    """A policy of --policy.

    Attributes:
        digest: of its weights.
        flags: of the run that made it, as far as they lie beside the policy: places on this machine are only there.
    """

    name: str
    policy: TopRLPolicy
    digest: str
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str | None:
        return self.policy.metadata.get("task")

    @property
    def model(self) -> str:
        return self.flags.get("model_name_or_path") or self.policy.metadata.get("model", "tiny")

    def task_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Complete the options ``given`` to ``make_task`` by what the policy was trained on.

        Raises:
            ValueError: there is only the file that it was trained on, or nobody knows where the data are.
        """
        options = {"metric": metric} if (metric := self.policy.metadata.get("ppo", {}).get("metric")) else {}
        if "dataset_path" in given:
            return options | given
        path = self.flags.get("dataset_path", "")
        if Path(path).is_file():
            raise ValueError(f"--policy {self.name}: {path} is what it was trained on; name test data: --dataset_path")
        if self.task == "custom" and not path:
            data = self.policy.metadata.get("data", {}).get("name", "own data")
            raise ValueError(f"--policy {self.name}: it was trained on {data}; name test data: --dataset_path")
        return options | given | ({"dataset_path": path} if path else {})


def load_policies(names: Sequence[str]) -> list[Trained]:
    """The policies of --policy.

    Raises:
        ValueError: no such folder, not a policy, or policies with different stages or models.
    """
    found = []
    for name in names:
        if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ValueError(f"--policy {name}: no such folder; give the policy folder that training/ppo.py wrote")
        try:
            policy = TopRLPolicy.from_pretrained(name).eval()
        except OSError as error:
            raise ValueError(f"--policy {name}: no such folder, and the Hub gives no policy: {error}") from error
        found.append(Trained(name, policy, weights_digest(policy), _flags_beside(Path(name))))
    for what, values in (
        ("stage layers", {one.policy.stage_layers for one in found}),
        ("models", {one.model for one in found}),
    ):
        if len(values) > 1:
            raise ValueError(f"--policy: different {what} {sorted(values)}; evaluate them apart")
    return found


def _flags_beside(folder: Path) -> dict[str, Any]:
    """Read the config.json of the run whose policy, best policy or checkpoint ``folder`` is; {} where there is none."""
    for parent in folder.resolve().parents[:2]:
        if (parent / "config.json").is_file() and (parent / "metrics.jsonl").is_file():
            return json.loads((parent / "config.json").read_text())
    return {}


def policies_for(task: str, policies: Sequence[Trained]) -> list[Trained]:
    """Those trained on ``task`` if there are any, otherwise all (transfer to another task)."""
    return [one for one in policies if one.task == task] or list(policies)
