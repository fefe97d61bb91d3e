"""The plug-in for lmms-eval: the models it adds and the meaning of their ``--model_args`` (docs/lmms_eval.md).

lmms-eval finds ``manifests`` by the entry point group ``lmms_eval.models``. The models themselves are in
``lmms_eval_models.py``, which lmms-eval imports when one is asked for; this module imports no lmms-eval until called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from toprl_models.methods import TopRLPolicy
from toprl_models.policy import Policy
from toprl_models.pruner import attach
from toprl_models.registry import METHODS, in_shares, layers_for, method_of, schedule_for
from toprl_models.schedule import Schedule

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest
    from transformers import PretrainedConfig, PreTrainedModel

MODELS = "toprl_models.integrations.lmms_eval_models"


def manifests() -> list[ModelManifest]:
    """List the models for lmms-eval, which calls this function."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest("toprl_llava_hf", f"{MODELS}.LlavaHf", f"{MODELS}.LlavaHfChat"),
        ModelManifest("toprl_qwen2_5_vl", f"{MODELS}.Qwen2_5_VL", f"{MODELS}.Qwen2_5_VLChat"),
    ]


@dataclass(frozen=True)
class PruningArguments:
    """Pruning options of ``--model_args``.

    Attributes:
        method: what ``toprl_models.method_of`` takes: a name, my_file.py:MyMethod, divprune+fastv.
        budget: visual tokens averaged over all decoder layers, more than 0.
        policy: folder or Hub id of the trained policy; None for methods that have none.
        stages: layers to prune before; None for the policy's, else those of the method's authors scaled to the depth.
        num_visual: how many visual tokens ``budget`` is out of; None where the model says it.
    """

    method: str
    budget: float
    policy: str | None = None
    stages: tuple[int, ...] | None = None
    num_visual: int | None = None

    @classmethod
    def take_from(cls, arguments: dict[str, Any]) -> PruningArguments:
        """Pop the pruning options out of a constructor's keyword arguments; the others stay.

        Values are what lmms-eval makes of the text after ``=``: bool, int or float where possible, else str.

        Raises:
            ValueError: an argument is missing, has an impossible value, or does not go with another one.
        """
        method, policy = arguments.pop("method", None), arguments.pop("policy", None)
        budget, num_visual = arguments.pop("budget", None), arguments.pop("num_visual", None)
        stages, mode = arguments.pop("stages", None), arguments.pop("mode", "compact")
        if mode != "compact":
            raise ValueError(f"mode={mode}: an evaluation removes tokens, which is mode=compact; leave mode out")
        return cls(
            method=_method(method, policy),
            budget=_budget(budget),
            policy=None if policy is None else str(policy),
            stages=None if stages is None else _layers(stages),
            num_visual=None if num_visual is None else _whole_number(num_visual),
        )

    def prepare(self, config: PretrainedConfig) -> tuple[Policy, Schedule]:
        """Make policy (on the CPU) and schedule for a model with ``config``, tried on a model without weights.

        Raises:
            ValueError: an impossible budget, or a policy or stages that do not fit the model.
            TypeError: a class of models that cannot be pruned.
        """
        num_layers, num_visual = config.get_text_config().num_hidden_layers, self._out_of(config)
        method = method_of(self.method)
        trained = None if self.policy is None else load_policy(self.policy)
        model = skeleton(config)
        layers = self.stages or layers_for(method, model, () if trained is None else trained.stage_layers)
        policy = method.make(layers, trained)
        try:
            counted = schedule_for(
                self.method, self.budget, num_visual=num_visual, num_layers=num_layers, layers=layers
            )
        except ValueError as error:
            stages = ":".join(map(str, layers))
            raise ValueError(f"budget={self.budget:g}, stages={stages}: {error}") from error
        schedule = in_shares(counted, num_visual)  # also where authors state numbers
        attach(model, policy, schedule=schedule).detach()
        return policy, schedule

    def _out_of(self, config: PretrainedConfig) -> int:
        """Return the number of visual tokens that the budget is out of."""
        if self.num_visual is not None:
            return self.num_visual
        if config.model_type != "llava":
            raise ValueError(
                f"budget={self.budget:g}: images have different numbers of visual tokens in a {config.model_type} "
                "model; say what the budget is out of, as in num_visual=576, and each keeps the same share"
            )
        vision = config.vision_config
        class_token = config.vision_feature_select_strategy == "full"
        return (vision.image_size // vision.patch_size) ** 2 + class_token


def load_policy(name: str) -> TopRLPolicy:
    """Load a trained policy from a folder or the Hub, in eval mode.

    Raises:
        ValueError: no policy is there.
    """
    try:
        return TopRLPolicy.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"policy={name}: give a folder that training/ppo.py wrote, or a Hub id: {error}") from error


def trained_parts(policy: Policy) -> list[TopRLPolicy]:
    """List the trained policies in ``policy``: itself, a policy that it holds, or those that it is composed of."""
    parts = getattr(policy, "policies", (policy,))
    return [inner for part in parts if isinstance(inner := getattr(part, "policy", part), TopRLPolicy)]


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model of ``config`` without memory for weights."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def _method(method: object, policy: object) -> str:
    if method is None and policy is None:
        raise ValueError(f"method is missing: give method=NAME ({', '.join(METHODS)}) or policy=FOLDER_OR_HUB_ID")
    method = "toprl" if method is None else str(method)
    try:
        trained = method_of(method).trained
    except ValueError as error:
        raise ValueError(f"method={method}: {error}") from error
    if trained and policy is None:
        raise ValueError(f"method={method} needs a trained policy: policy=FOLDER_OR_HUB_ID")
    if not trained and policy is not None:
        raise ValueError(f"policy={policy}: method={method} takes no policy; leave one of the two out")
    return method


def _budget(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        problem = "budget is missing" if value is None else f"budget={value} is not a positive number"
        raise ValueError(f"{problem}; give visual tokens averaged over all layers, as in budget=192")
    return float(value)


def _whole_number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"num_visual={value} is not a positive whole number; give what the budget is out of")
    return value


def _layers(text: object) -> tuple[int, ...]:
    """Read layers such as ``2:8:16``; a single layer arrives as an int."""
    try:
        layers = tuple(int(part) for part in str(text).split(":"))
        Schedule(tuple((layer, 1.0) for layer in layers))
    except ValueError as error:
        raise ValueError(
            f"stages={text}: must be the layers to prune before, ascending, with colons between them, as in "
            f"stages=2:8:16 ({error})"
        ) from error
    return layers
