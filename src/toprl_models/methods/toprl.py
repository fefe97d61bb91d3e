"""TOP-RL (Wang et al.): the learned policy, an actor over visual tokens and a critic."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from toprl_kernels import ActorWeights, FoldedActorWeights, actor_score, fold_actor_weights
from toprl_kernels.stage.reference import score_difference
from toprl_models.policy import Decision, Policy, StageContext
from toprl_models.registry import register_method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule

CONDITIONS = ("none", "text")
TEXT_SCORES = 3
# the scores and zeros after them: rows of the actor's input stay aligned for the kernels
TEXT_COLUMNS = 16


def text_scores(context: StageContext) -> Tensor:
    """Score how much the question attends to each visual token: float32 ``[B, V, TEXT_SCORES]``.

    Softmax of the queries and keys of the stage's layer ("current" attention), rotary positions included, mean over
    heads: the largest of the text tokens after the images, their mean, and that of the last text token. Each is a
    logarithm with mean 0 and deviation 1 over the sample's surviving tokens, so that neither their number nor the share
    of text keys matters; 0 where ``valid_mask`` is False. No gradient.
    """
    attention, (_, are_text) = context.text_attention(), context.text_states()
    number = are_text.sum(1)[:, None]
    last = attention.gather(1, (number - 1)[..., None].expand(-1, -1, attention.shape[2]))[:, 0]
    scores = torch.stack([attention.amax(1), attention.sum(1) / number, last], -1)
    weight = context.valid_mask[..., None].to(scores.dtype)
    tokens = weight.sum(1, keepdim=True).clamp(min=1)
    scores = (scores + 1e-6).log() * weight  # exp(-14): below that the softmax is rounding
    scores = (scores - scores.sum(1, keepdim=True) / tokens) * weight
    return scores / (scores.square().sum(1, keepdim=True) / tokens + 1e-4).sqrt()


def model_signature(model: PreTrainedModel) -> dict[str, Any]:
    """Return the properties of a model that a learned policy depends on."""
    text = model.config.get_text_config()
    return {
        "model_type": model.config.model_type,
        "text_model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
    }


@register_method("toprl", "TOP-RL", "TOP-RL", staged=True, from_trained=lambda policy, layers: policy)
class TopRLPolicy(nn.Module, Policy, PyTorchModelHubMixin):
    """TOP-RL's agent: a light MLP actor over visual tokens, shared by all stages, and a critic.

    The actor is the network that Eq. 11 counts: LayerNorm, ``d -> actor_size`` with a bias per stage, half local and
    half mean over the surviving tokens, two ``actor_size -> actor_size`` layers, keep and drop logits. The critic sees
    the mean of the surviving tokens, the last prompt token's state, the kept fraction and the stage.

    With ``condition_on="text"`` both also see the question, at the stage's layer: the actor's input is wider, the rest
    is the same. The token's state h_i is followed by the mean state of the text tokens after the images and
    ``text_scores``, all of the same weight::

        [LayerNorm(h_i), LayerNorm(mean_r h_r), sqrt(d / 3) * text_scores_i, 0 ...]        2 d + TEXT_COLUMNS wide

    Args:
        hidden_size: width d of the decoder.
        stage_layers: the layers before which the stages prune; their number is T.
        actor_size: hidden width of the actor (256 for the 7B models).
        base_model: ``model_signature(model)`` of the model that the policy is trained for; checked on ``attach``.
        keep_bias: initial keep logit, so that training starts from keeping most tokens.
        metadata: free JSON data (task, metrics), stored with the policy.
        condition_on: "none" is the paper's state, in which the actor sees visual tokens alone; "text" the question too.

    In eval mode ``attach`` makes a copy of the actor's weights in the model's dtype, prepared for the kernels, which
    scores as long as the policy is attached: call ``fold`` when the weights change meanwhile. In training mode the
    weights themselves score, in their dtype.

    Saving and loading are PyTorchModelHubMixin's: ``save_pretrained(folder)``, ``push_to_hub(id)``,
    ``TopRLPolicy.from_pretrained(folder_or_id)``; loading is strict.

    Raises:
        ValueError: a non-positive size, an odd ``actor_size``, no stage, an unknown ``condition_on``.
    """

    def __init__(
        self,
        hidden_size: int,
        stage_layers: list[int],
        actor_size: int = 256,
        base_model: dict[str, Any] | None = None,
        keep_bias: float = 1.5,
        metadata: dict[str, Any] | None = None,
        condition_on: str = "none",
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size={hidden_size} must be positive")
        if actor_size < 2 or actor_size % 2:
            raise ValueError(f"actor_size={actor_size} must be even and positive (half local, half global)")
        if not stage_layers:
            raise ValueError("stage_layers is empty; name the layers that prune")
        if condition_on not in CONDITIONS:
            raise ValueError(f"condition_on={condition_on!r} must be one of {', '.join(CONDITIONS)}")
        self.hidden_size = hidden_size
        self.stage_layers = tuple(stage_layers)
        self.base_model = base_model
        self.metadata = metadata or {}
        self.condition_on = condition_on
        self.attention_from = "current" if condition_on == "text" else "none"
        self.uses_text = condition_on != "none"
        self.input_size = 2 * hidden_size + TEXT_COLUMNS if condition_on == "text" else hidden_size
        num_stages = len(stage_layers)
        self.norm = nn.LayerNorm(self.input_size)
        self.stage_bias = nn.Parameter(torch.zeros(num_stages, actor_size))
        self.fc1 = nn.Linear(self.input_size, actor_size)
        self.fc2 = nn.Linear(actor_size, actor_size)
        self.fc3 = nn.Linear(actor_size, actor_size)
        self.head = nn.Linear(actor_size, 2)
        self.critic = nn.Sequential(
            nn.Linear(2 * self.input_size + 1 + num_stages, actor_size),
            nn.GELU(),
            nn.Linear(actor_size, actor_size),
            nn.GELU(),
            nn.Linear(actor_size, 1),
        )
        self.critic_norm = nn.LayerNorm(self.input_size)
        # Orthogonal, small policy head and unit value head, as PPO implementations do
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.orthogonal_(layer.weight, 2**0.5)
            nn.init.zeros_(layer.bias)
        nn.init.orthogonal_(self.head.weight, 0.01)
        value_head = self.critic[-1]
        assert isinstance(value_head, nn.Linear)
        nn.init.orthogonal_(value_head.weight, 1.0)
        with torch.no_grad():
            self.head.bias.copy_(torch.tensor([keep_bias, 0.0]))
        self._folded: OrderedDict[int, FoldedActorWeights] = OrderedDict()  # a copy for each attached model

    def actor_weights(self) -> ActorWeights:
        """Return the actor's parameters in the form that ``toprl_kernels.actor_score`` takes."""
        return ActorWeights(
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            stage_bias=self.stage_bias,
            fc1_weight=self.fc1.weight,
            fc1_bias=self.fc1.bias,
            fc2_weight=self.fc2.weight,
            fc2_bias=self.fc2.bias,
            fc3_weight=self.fc3.weight,
            fc3_bias=self.fc3.bias,
            head_weight=self.head.weight,
            head_bias=self.head.bias,
        )

    def inputs(self, context: StageContext) -> tuple[Tensor, Tensor]:
        """Make the inputs of actor and critic: tokens ``[B, V, input_size]`` and text ``[B, input_size]``.

        They have the policy's dtype; nothing in them is learned, so an episode records them once. With
        ``condition_on="none"`` they are the states themselves.

        Raises:
            ValueError: ``condition_on="text"`` and a prompt that ends in a visual token.
        """
        weight = self.head.weight  # its dtype, and its device where a model is spread over several
        hidden_states, text_state = context.hidden_states.to(weight), context.text_state.to(weight)
        if self.condition_on == "none":
            return hidden_states, text_state
        states, are_text = context.text_states()
        pooled = states.to(weight).sum(1) / are_text.to(weight.device).sum(1)[:, None]
        width = (self.hidden_size,)
        scores = (self.hidden_size / TEXT_SCORES) ** 0.5 * text_scores(context).to(weight)
        question = F.layer_norm(pooled, width)[:, None].expand_as(hidden_states)
        tokens = torch.cat([F.layer_norm(hidden_states, width), question, scores], -1)
        text = torch.cat([text_state, pooled], -1)
        return F.pad(tokens, (0, TEXT_COLUMNS - TEXT_SCORES)), F.pad(text, (0, TEXT_COLUMNS))

    def logits(self, hidden_states: Tensor, stage: int, valid_mask: Tensor) -> Tensor:
        """Compute keep and drop logits ``[B, V, 2]`` of visual tokens ``[B, V, input_size]`` (``inputs``)."""
        if hidden_states.shape[1] == 0:  # an earlier stage dropped everything
            return hidden_states.new_zeros(len(hidden_states), 0, 2)
        return actor_score(hidden_states, stage, self.actor_weights(), valid_mask=valid_mask)

    def value(
        self, hidden_states: Tensor, stage: int, valid_mask: Tensor, text_state: Tensor, kept_fraction: Tensor
    ) -> Tensor:
        """Estimate the discounted reward from ``stage`` on, by the critic: ``[B]``.

        Args:
            hidden_states: ``[B, V, input_size]`` visual tokens (``inputs``).
            stage: 0-based.
            valid_mask: bool ``[B, V]``, the surviving tokens.
            text_state: ``[B, input_size]`` the last prompt token's state, and what else ``inputs`` gives of the text.
            kept_fraction: ``[B]`` surviving share of the original tokens before this stage acts.
        """
        weight = valid_mask.to(hidden_states.dtype)[..., None]
        pooled = (hidden_states * weight).sum(1) / weight.sum(1).clamp(min=1)
        one_hot = torch.zeros(len(hidden_states), len(self.stage_layers)).to(hidden_states)
        one_hot[:, stage] = 1
        features = [self.critic_norm(pooled), self.critic_norm(text_state), kept_fraction[:, None].to(pooled), one_hot]
        return self.critic(torch.cat(features, -1)).squeeze(-1)

    def score(self, context: StageContext) -> Tensor:
        """Score by keep logit minus drop logit: the top-k are the tokens most likely kept."""
        return score_difference(self.decide(context).scores)

    @torch.no_grad()
    def decide(self, context: StageContext) -> Decision:
        """Return keep and drop logits ``[B, V, 2]``, whose difference decides."""
        valid, folded = context.valid_mask, None
        if self._folded and not self.training:
            folded = next(reversed(self._folded.values()))
        if folded is None or valid.device != folded.bias.device or not valid.shape[1]:
            tokens = self.inputs(context)[0]
            logits = self.logits(tokens, context.stage, valid.to(tokens.device)).to(valid.device)
        elif self.condition_on == "none" and context.sequence is not None:
            logits = actor_score(context.sequence, context.stage, folded, valid_mask=valid, indices=context.slots)
        else:
            logits = actor_score(self.inputs(context)[0], context.stage, folded, valid_mask=valid)
        return Decision(logits)

    def hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Prepare the actor's weights for ``model`` until the handle is removed, in eval mode."""
        handle = RemovableHandle(self._folded)
        if not self.training:
            self.fold(model.dtype, handle.id)
        return [handle]

    def fold(self, dtype: torch.dtype | None = None, key: int | None = None) -> None:
        """Prepare the actor's weights for inference in ``dtype`` again, for every model the policy is attached to."""
        for each in list(self._folded) if key is None else [key]:
            known = self._folded.get(each)
            wanted = known.folded_weight.dtype if dtype is None and known is not None else dtype
            self._folded[each] = fold_actor_weights(self.actor_weights(), wanted)

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        signature = model_signature(model)
        if signature["hidden_size"] != self.hidden_size:
            raise ValueError(
                f"policy: trained for hidden_size={self.hidden_size}, but the model has {signature['hidden_size']}; "
                "attach it to the model it was trained on, or train a new one"
            )
        if self.base_model is not None and self.base_model != signature:
            raise ValueError(f"policy: trained for {self.base_model}, but the model is {signature}")
        # offloaded weights are on "meta" until their layer runs
        if model.device.type != "meta" and self.head.weight.device != model.device:
            raise ValueError(
                f"policy is on {self.head.weight.device}, the model on {model.device}; use policy.to(model.device)"
            )
        if schedule.layers != self.stage_layers:
            raise ValueError(
                f"schedule: stages at layers {schedule.layers}, but the policy was trained for {self.stage_layers}"
            )

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> TopRLPolicy:
        # The mixin defaults to strict=False, which would leave missing weights random.
        try:
            return super()._from_pretrained(strict=True, **kwargs)
        except Exception as error:
            if isinstance(error, FileNotFoundError | ConnectionError):
                raise
            raise ValueError(
                f"policy folder {kwargs.get('model_id')!r} is corrupt or does not match its config: {error}"
            ) from error

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> TopRLPolicy:
        """Load a policy folder or Hub id.

        Raises:
            ValueError: weights or config are missing, corrupt or do not fit together.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            for name in ("config.json", "model.safetensors"):
                if not (folder / name).is_file():
                    raise ValueError(f"policy folder {str(folder)!r} has no {name}; it is not a saved TopRLPolicy")
            try:
                values = json.loads((folder / "config.json").read_text())
            except ValueError as error:
                raise ValueError(f"policy folder {str(folder)!r}: config.json is not JSON: {error}") from error
            if not isinstance(values, dict):
                raise ValueError(
                    f"policy folder {str(folder)!r}: config.json holds {values!r}, not the policy's settings"
                )
        return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)
