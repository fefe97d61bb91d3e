"""Options of the vLLM plug-in: what they mean, what is refused, and how many tokens an image keeps. Needs no vLLM.

vllm serve MODEL --additional-config '{"toprl": {"method": "divprune", "keep": 0.25}}'
vllm serve MODEL --additional-config '{"toprl": {"method": "fastv", "stages": [[2, 0.5], [8, 0.25]]}}'
TOPRL_VLLM='{"policy": "runs/ocr/policy", "keep": 16}' vllm serve MODEL
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toprl_models.integrations.lmms_eval import load_policy, skeleton
from toprl_models.methods._tower import TowerPolicy
from toprl_models.methods.toprl import TopRLPolicy
from toprl_models.plugins import files_of
from toprl_models.policy import Policy
from toprl_models.pruner import attach
from toprl_models.registry import METHODS, Method, method_of
from toprl_models.schedule import Keep, Schedule

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KEY = "toprl"  # in --additional-config
VARIABLE = "TOPRL_VLLM"
EXAMPLE = '{"method": "divprune", "keep": 0.25}'
STAGES = '"stages": [[2, 0.5], [8, 0.25], [16, 64]] (before which decoder layer, how much stays)'
# the releases whose processors and model runner the plug-in is tested with, and the patch releases of them
TESTED_VLLM = ("0.31", "0.32")
# what a pruned variant of a class is called: before the language model, and inside its decoder
PREFIX, INSIDE = "Toprl", "ToprlInside"
# vLLM's names of the classes that have one
ARCHITECTURES = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
)
# those that cannot be pruned inside the decoder, and why
NOT_INSIDE = {
    "Qwen3VLForConditionalGeneration": "its decoder adds features of the vision tower between layers (deepstack)",
    "Gemma3ForConditionalGeneration": "its decoder has layers with a sliding window",
}


@dataclass(frozen=True)
class PruningOptions:
    """Pruning of every image before the language model, or of a prompt's images inside its decoder.

    Attributes:
        method: what ``toprl_models.method_of`` takes: a name, or my_file.py:MyMethod.
        keep: share of an image's visual tokens in (0, 1], or a number of tokens of every image, at least 1; None where
            there are stages.
        policy: folder or Hub id of the trained policy; None for methods that have none.
        stages: of pruning inside the decoder, as in ``Schedule``; None where there is ``keep``.
    """

    method: str
    keep: float | None = None
    policy: str | None = None
    stages: tuple[tuple[int, Keep], ...] | None = None

    @classmethod
    def read(cls, given: object) -> PruningOptions:
        """Read the options of ``--additional-config`` or of the environment variable.

        Raises:
            ValueError: ``given`` is not a mapping, an option is unknown, missing or has an impossible value.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f"{KEY}={given!r} must be a JSON object such as {EXAMPLE}")
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{KEY}: {', '.join(map(repr, unknown))} is unknown; the options are {', '.join(known)}")
        method, policy = given.get("method"), given.get("policy")
        if method is None and policy is None:
            raise ValueError(
                f'{KEY}: method is missing; give "method": NAME ({", ".join(METHODS)}) or "policy": FOLDER_OR_HUB_ID'
            )
        if policy is not None and not isinstance(policy, str):
            raise ValueError(f"{KEY}: policy={policy!r} must be a string, a folder or Hub id")
        name = "toprl" if method is None else str(method)
        trained = method_of(name).trained
        if trained != (policy is not None):
            fix = 'needs a trained policy: "policy": FOLDER_OR_HUB_ID' if trained else "takes no policy; leave it out"
            raise ValueError(f"{KEY}: method={name!r} {fix}")
        if given.get("stages") is None:
            return cls(name, _keep(given.get("keep")), policy)
        if given.get("keep") is not None:
            raise ValueError(f"{KEY}: keep is for pruning before the language model, stages for inside: leave one out")
        return cls(name, None, policy, _stages(given["stages"]))

    @classmethod
    def stored_in(cls, config: Any) -> PruningOptions:
        """Read the options that ``plugin.configure`` stored in a model's config."""
        return cls(**{field.name: config.toprl[field.name] for field in fields(cls)})

    @property
    def schedule(self) -> Schedule:
        """The stages; without any, keep so much of every image before layer 0."""
        return Schedule(self.stages or ((0, self._keep),))

    @property
    def _keep(self) -> float:
        assert self.keep is not None
        return self.keep

    def describe(self, model: str) -> str:
        """Say what is kept of the images of a model, for the log."""
        if self.stages is None:
            kept = f"{self.keep:.1%}" if isinstance(self.keep, float) else f"{self.keep} tokens"
            return f"{self.method} keeps {kept} of every image of {model}"
        kept = ", ".join(f"{keep} before layer {layer}" for layer, keep in self.stages)
        return f"{self.method} keeps {kept} of a prompt's visual tokens in {model}"

    def count(self, num_visual: int) -> int:
        """Count the tokens that an image of ``num_visual`` tokens keeps: as ``Schedule.counts``, but at least 1.

        Example:
            >>> PruningOptions("divprune", 0.25).count(576)
            144
        """
        return max(min(1, num_visual), self.schedule.counts(num_visual)[0])

    @functools.cached_property
    def digest(self) -> str:
        """Digest of all that decides what is kept: options, the policy's files and the file of an own method."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode())
        paths = files_of(self.method)
        if self.policy is not None and (folder := Path(self.policy).expanduser()).is_dir():
            paths += [folder / "config.json", folder / "model.safetensors"]
        elif self.policy is not None:
            weights = load_policy(self.policy).state_dict()
            for name, tensor in sorted(weights.items()):
                digest.update(name.encode() + tensor.numpy().tobytes())
        for path in paths:
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def prepare(self, config: PretrainedConfig) -> Policy:
        """Make the policy for a model with ``config``, on the CPU, after a trial on the model's skeleton.

        Raises:
            ValueError: the method cannot run here, or does not fit the model.
        """
        method, first = method_of(self.method), self.schedule.layers
        trained = None if self.policy is None else load_policy(self.policy)
        if self.stages is not None:
            return self._prepare_inside(config, method, trained)
        if len(method.parts) > 1:
            raise ValueError(
                f"{KEY}: method={self.method!r} prunes inside the decoder: give {STAGES}, or one method that prunes "
                "before the language model"
            )
        policy = method.make(first, trained)
        if self.method == "toprl" and trained is not None and trained.stage_layers != first:
            raise ValueError(
                f"{KEY}: policy={self.policy!r} was trained for stages before layers {trained.stage_layers}, but "
                "before the language model there is one, at layer 0: train with --stage_layers 0, or give "
                '"method": "oneshot", which takes the last stage\'s decision there'
            )
        if reason := why_not(policy):
            raise ValueError(
                f"{KEY}: method={self.method!r} {reason}; methods that can: {', '.join(possible())}; to prune inside "
                f"the decoder, give {STAGES} in place of keep"
            )
        tower = getattr(getattr(config, "vision_config", None), "model_type", None)
        is_readable = config.model_type in ("llava", "llava_next") and tower == "clip_vision_model"
        if isinstance(getattr(policy, "policy", policy), TowerPolicy) and not is_readable:
            raise ValueError(
                f"{KEY}: method={self.method!r} reads attention inside the vision tower, which the plug-in finds in "
                f"LLaVA-1.5 and LLaVA-NeXT with a CLIP tower only, not in {config.model_type} with {tower}: choose "
                "another method, such as divprune"
            )
        try:
            attach(skeleton(config), policy, schedule=self.schedule).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{KEY}: method={self.method!r}, keep={self.keep}: {error}") from error
        return policy

    def _prepare_inside(self, config: PretrainedConfig, method: Method, trained: TopRLPolicy | None) -> Policy:
        """Make the policy of the stages, after a trial on the model's skeleton."""
        try:
            policy = method.make(self.schedule.layers, trained)
            if reason := why_not_inside(policy):
                raise ValueError(f"{reason}: give keep in place of stages, or another method")
            attach(skeleton(config), policy, schedule=self.schedule).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{KEY}: method={self.method!r}, stages={self.stages}: {error}") from error
        return policy


def why_not_inside(policy: Policy) -> str:
    """Say why ``policy`` cannot decide inside vLLM's decoder; "" where it can."""
    for part in getattr(policy, "policies", (policy,)):
        inner = getattr(part, "policy", part)
        if type(inner).hooks is not Policy.hooks and not isinstance(inner, TopRLPolicy):
            return f"{type(inner).__name__} hooks modules of transformers, such as its vision tower"
    return ""


def why_not(policy: Policy) -> str:
    """Say why ``policy`` cannot decide on what the vision tower made of an image; "" where it can."""
    if policy.attention_from != "none":
        return "reads attention inside the decoder"
    if policy.uses_text:
        return (
            "reads the question, but vLLM encodes images apart (an own class says uses_text = False where it is blind)"
        )
    inner = getattr(policy, "policy", policy)
    if type(inner).hooks is not Policy.hooks and not isinstance(inner, TopRLPolicy | TowerPolicy):
        return "hooks modules of transformers, which vLLM does not have"
    return ""


def possible() -> list[str]:
    """Name the registered methods that can prune before the language model in vLLM."""
    names = []
    for name, method in METHODS.items():
        if method.trained or (not why_not(method.policy()) and (method.staged or method.stages == (0,))):
            names.append(name)
    return names


def options_of(additional: object) -> PruningOptions | None:
    """Return the options of vLLM's ``additional_config``, else those of the environment; None: prune nothing.

    Raises:
        ValueError: wrong options, or different ones in both places.
    """
    here = additional.get(KEY) if isinstance(additional, Mapping) else None
    text = os.environ.get(VARIABLE, "").strip()
    told = None if here is None else PruningOptions.read(here)
    if not text:
        return told
    try:
        inherited = PruningOptions.read(json.loads(text))
    except ValueError as error:
        raise ValueError(f"{VARIABLE}={text}: {error}; give JSON such as {EXAMPLE}, or unset it") from error
    if told is not None and told != inherited:
        raise ValueError(f"additional_config says {told}, {VARIABLE} says {inherited}: unset one of them")
    return inherited


def is_tested(version: str) -> bool:
    """Tell whether the plug-in knows the models of this vLLM."""
    return ".".join(version.split("+")[0].split(".")[:2]) in TESTED_VLLM


def check_version(version: str) -> None:
    """Raise ValueError for a vLLM whose processors and models the plug-in does not know."""
    if not is_tested(version):
        raise ValueError(
            f"{KEY}: vLLM {version} is installed, but the plug-in knows the models of vLLM {' and '.join(TESTED_VLLM)} "
            f"only: pip install 'vllm~={TESTED_VLLM[-1]}.0', or leave {KEY} out"
        )


def _stages(value: Any) -> tuple[tuple[int, Keep], ...]:
    try:
        stages = tuple((layer, keep) for layer, keep in value)
        Schedule(stages)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{KEY}: stages={value!r} must be {STAGES}: {error}") from error
    return stages


def _keep(value: Any) -> float:
    fix = (
        '"keep": 0.25 (a share of each image\'s tokens, at most 1.0) or "keep": 64 (tokens of each image) before the '
        f"language model, or {STAGES} inside its decoder"
    )
    if value is None:
        raise ValueError(f"{KEY}: keep is missing; give {fix}")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 < value <= 1 if isinstance(value, float) else value >= 1):
        raise ValueError(f"{KEY}: keep={value!r} must be {fix}")
    return value
