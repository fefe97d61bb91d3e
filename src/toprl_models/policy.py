"""What decides which visual tokens stay: the Policy protocol and TOP-RL's actor and critic."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from toprl_kernels import ActorWeights, actor_score

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule


class PromptEmbeddings(NamedTuple):
    """What entered layer 0, rows padded with zeros at their end.

    Shapes: ``visual`` ``[B, V0, d]`` the original visual tokens, ``text`` ``[B, R, d]`` the tokens behind the last
    visual token; ``visual_valid`` bool ``[B, V0]`` and ``text_valid`` bool ``[B, R]`` are False for padding.
    """

    visual: Tensor
    visual_valid: Tensor
    text: Tensor
    text_valid: Tensor


@dataclass(frozen=True)
class StageContext:
    """What a policy may look at when stage ``stage`` decides (state s_t of the paper, and what baselines need).

    Shapes: B samples, V visual slots (the longest row; shorter rows are padded), N slots of all tokens, d hidden size.

    Attributes:
        stage: index of the stage, 0-based.
        layer: decoder layer before which the stage prunes.
        hidden_states: visual token states ``[B, V, d]``, in raster order.
        valid_mask: bool ``[B, V]``, False for padding and for tokens that an earlier stage dropped.
        visual_index: int64 ``[B, V]``, each slot's number among the sample's original visual tokens.
        num_visual: original visual tokens per sample, on the host.
        num_keep: tokens this stage shall keep per sample, on the host.
        text_state: state of the last prompt token ``[B, d]``.
        last_attention: call it for the attention of the last prompt token to each visual token, float32 ``[B, V]``:
            softmax over all keys it may see, mean over heads (see ``Policy.attention_from``).
        text_attention: call it for the same of every text token behind the images, float32 ``[B, R, V]``; the rows
            are those of ``prompt().text``.
        prompt: call it for the embeddings that entered layer 0.
        inputs: the keyword arguments the model was called with: ``pixel_values``, ``image_sizes``, ..., or what
            ``generate()`` of recent releases has made of them, ``mm_encoder_outputs`` alone.
    """

    stage: int
    layer: int
    hidden_states: Tensor
    valid_mask: Tensor
    visual_index: Tensor
    num_visual: tuple[int, ...]
    num_keep: tuple[int, ...]
    text_state: Tensor
    last_attention: Callable[[], Tensor]
    text_attention: Callable[[], Tensor]
    prompt: Callable[[], PromptEmbeddings]
    inputs: Mapping[str, Any]

    def of_original(self, values: Tensor) -> Tensor:
        """What is given per original visual token, ``[B, max(num_visual)]``, for the slots of this stage: ``[B, V]``.

        A draw per original token is the same draw whether earlier stages removed or masked what they dropped.
        """
        return values.gather(1, self.visual_index.clamp(min=0))


class Decision(NamedTuple):
    """What a stage decides.

    Attributes:
        scores: ``[B, V]``, the larger the more worth keeping.
        keep_mask: ``[B, V]`` for policies that do not take the top-k of ``scores``.
        states: ``[B, V, d]``, new states of the visual slots, for policies that merge tokens: what is kept goes on with
            them. A stage that drops nothing changes nothing.
    """

    scores: Tensor
    keep_mask: Tensor | None = None
    states: Tensor | None = None


class Policy:
    """Base of all policies: override ``score``; the pruner keeps the ``num_keep`` best per sample.

    Attributes:
        attention_from: "none" when ``last_attention`` is never called; "previous" for the attention inside layer
            ``layer - 1`` (FastV), "current" for the query and key of layer ``layer`` applied to the states that are
            about to enter it (PyramidDrop).
        positions: "original" when survivors keep their positions, "renumbered" when they and all behind them get
            consecutive ones at each stage, in which decoding goes on. M-RoPE positions (Qwen) are places in the image,
            not numbers, and always stay. Mode "mask" removes nothing, so that it knows original positions only.
    """

    attention_from: str = "none"
    positions: str = "original"

    def score(self, context: StageContext) -> Tensor:
        """Scores ``[B, V]``, the larger the more worth keeping; NaN ranks last."""
        raise NotImplementedError

    def decide(self, context: StageContext) -> Decision:
        """The stage's decision; the default is the deterministic top-k of ``score``."""
        return Decision(self.score(context))

    def counts(self, schedule: Schedule, num_visual: int) -> tuple[int, ...]:
        """Tokens behind each stage of a sample with ``num_visual`` visual tokens, merged ones included."""
        return schedule.counts(num_visual)

    def hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Register module hooks of the policy's own, which go when it is detached; return their handles."""
        return []

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        """Raise when the policy does not fit the model or the schedule; called by ``attach`` before anything else."""


def model_signature(model: PreTrainedModel) -> dict[str, Any]:
    """What a learned policy must agree on with the model it is attached to."""
    text = model.config.get_text_config()
    return {
        "model_type": model.config.model_type,
        "text_model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
    }


class TopRLPolicy(nn.Module, Policy, PyTorchModelHubMixin):
    """TOP-RL's agent: a light MLP actor over visual tokens, shared by all stages, and a critic.

    The actor is the network that Eq. 11 counts: LayerNorm, ``d -> actor_size`` with a bias per stage, half local and
    half mean over the surviving tokens, two ``actor_size -> actor_size`` layers, keep and drop logits. The critic sees
    the mean of the surviving tokens, the last prompt token's state, the kept fraction and the stage.

    Args:
        hidden_size: width d of the decoder.
        stage_layers: the layers the stages prune before; their number is T.
        actor_size: hidden width of the actor (256 for the 7B models).
        base_model: ``model_signature(model)`` of the model it is trained for; checked on ``attach``.
        keep_bias: initial keep logit, so that training starts from keeping most tokens.
        metadata: free JSON data (task, metrics), stored with the policy.

    Saving and loading are PyTorchModelHubMixin's: ``save_pretrained(folder)``, ``push_to_hub(id)``,
    ``TopRLPolicy.from_pretrained(folder_or_id)``; loading is strict.

    Raises:
        ValueError: a non-positive size, an odd ``actor_size``, no stage.
    """

    def __init__(
        self,
        hidden_size: int,
        stage_layers: list[int],
        actor_size: int = 256,
        base_model: dict[str, Any] | None = None,
        keep_bias: float = 1.5,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size={hidden_size} must be positive")
        if actor_size < 2 or actor_size % 2:
            raise ValueError(f"actor_size={actor_size} must be even and positive (half local, half global)")
        if not stage_layers:
            raise ValueError("stage_layers is empty; name the layers that prune")
        self.hidden_size = hidden_size
        self.stage_layers = tuple(stage_layers)
        self.base_model = base_model
        self.metadata = metadata or {}
        num_stages = len(stage_layers)
        self.norm = nn.LayerNorm(hidden_size)
        self.stage_bias = nn.Parameter(torch.zeros(num_stages, actor_size))
        self.fc1 = nn.Linear(hidden_size, actor_size)
        self.fc2 = nn.Linear(actor_size, actor_size)
        self.fc3 = nn.Linear(actor_size, actor_size)
        self.head = nn.Linear(actor_size, 2)
        self.critic = nn.Sequential(
            nn.Linear(2 * hidden_size + 1 + num_stages, actor_size),
            nn.GELU(),
            nn.Linear(actor_size, actor_size),
            nn.GELU(),
            nn.Linear(actor_size, 1),
        )
        self.critic_norm = nn.LayerNorm(hidden_size)
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

    def actor_weights(self) -> ActorWeights:
        """The actor's parameters in the form that ``toprl_kernels.actor_score`` takes."""
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

    def logits(self, hidden_states: Tensor, stage: int, valid_mask: Tensor) -> Tensor:
        """Keep and drop logits ``[B, V, 2]`` of the visual tokens at ``stage``."""
        if hidden_states.shape[1] == 0:  # an earlier stage dropped everything
            return hidden_states.new_zeros(len(hidden_states), 0, 2)
        return actor_score(hidden_states, stage, self.actor_weights(), valid_mask=valid_mask)

    def value(
        self, hidden_states: Tensor, stage: int, valid_mask: Tensor, text_state: Tensor, kept_fraction: Tensor
    ) -> Tensor:
        """The critic's estimate ``[B]`` of the discounted reward from ``stage`` on.

        Args:
            hidden_states: ``[B, V, d]`` visual token states.
            stage: 0-based.
            valid_mask: bool ``[B, V]``, the surviving tokens.
            text_state: ``[B, d]`` state of the last prompt token.
            kept_fraction: ``[B]`` surviving share of the original tokens before this stage acts.
        """
        weight = valid_mask.to(hidden_states.dtype)[..., None]
        pooled = (hidden_states * weight).sum(1) / weight.sum(1).clamp(min=1)
        one_hot = torch.zeros(len(hidden_states), len(self.stage_layers)).to(hidden_states)
        one_hot[:, stage] = 1
        features = [self.critic_norm(pooled), self.critic_norm(text_state), kept_fraction[:, None].to(pooled), one_hot]
        return self.critic(torch.cat(features, -1)).squeeze(-1)

    def score(self, context: StageContext) -> Tensor:
        """Keep logit minus drop logit: its top-k are the tokens most likely kept."""
        with torch.no_grad():
            logits = self.logits(context.hidden_states.to(self.head.weight.dtype), context.stage, context.valid_mask)
        return logits[..., 0] - logits[..., 1]

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        found = model_signature(model)
        if found["hidden_size"] != self.hidden_size:
            raise ValueError(
                f"policy: trained for hidden_size={self.hidden_size}, but the model has {found['hidden_size']}; "
                "attach it to the model it was trained on, or train a new one"
            )
        if self.base_model is not None and self.base_model != found:
            raise ValueError(f"policy: trained for {self.base_model}, but the model is {found}")
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
                json.loads((folder / "config.json").read_text())
            except ValueError as error:
                raise ValueError(f"policy folder {str(folder)!r}: config.json is not JSON: {error}") from error
        return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)
