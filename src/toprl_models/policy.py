"""Policy, StageContext and Decision: all that the author of a pruning method needs to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from toprl_kernels.stage.reference import score_difference

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule


class PromptEmbeddings(NamedTuple):
    """Embeddings that entered layer 0; shorter rows are padded with zeros at their end.

    Shapes: ``visual`` ``[B, V0, d]``, the original visual tokens; ``text`` ``[B, R, d]``, the question: what follows
    the last visual token up to the prompt's end. ``visual_valid`` and ``text_valid`` are False for padding.
    """

    visual: Tensor
    visual_valid: Tensor
    text: Tensor
    text_valid: Tensor


class TextStates(NamedTuple):
    """States ``[B, R, d]`` of the question at a stage, and ``valid`` ``[B, R]``, False for padding (which is zeros)."""

    states: Tensor
    valid: Tensor


def _without_text() -> TextStates:
    raise RuntimeError("this StageContext was made without text_states")


def _without_attention() -> tuple[Tensor, Tensor]:
    raise RuntimeError("this StageContext was made without key_norms and peak_attention")


@dataclass(frozen=True)
class StageContext:
    """What a policy may look at when a stage decides (state s_t of the paper, and what other methods need).

    Shapes: B prompts (rows of the batch; a packed row counts once per prompt), V visual slots (the longest prompt;
    others are padded), d hidden size. The *question* is what follows the last visual token up to the prompt's end; an
    answer that stands in the same forward pass is never shown.

    Attributes:
        stage: index of the stage, 0-based.
        layer: decoder layer before which the stage prunes.
        hidden_states: visual token states ``[B, V, d]``, in raster order.
        valid_mask: bool ``[B, V]``, False for padding and for tokens that an earlier stage dropped.
        visual_index: int64 ``[B, V]``, each slot's number among the prompt's original visual tokens.
        num_visual: original visual tokens per prompt, on the host.
        num_keep: tokens that this stage keeps per prompt, on the host.
        text_state: state of the last prompt token ``[B, d]``.
        last_attention: call it for the attention of the last prompt token to each visual token, float32 ``[B, V]``: the
            model's own attention weights, mean over heads (see ``Policy.attention_from``).
        text_attention: call it for the same of every question token, float32 ``[B, R, V]``.
        prompt: call it for the embeddings that entered layer 0.
        inputs: the keyword arguments of the model: ``pixel_values``, ``image_sizes``, ..., or ``mm_encoder_outputs``
            alone, which ``generate()`` of recent releases makes of them.
        text_states: call it for the states of the question tokens, the rows of ``text_attention()``. Contexts made by
            hand may leave it out.
        key_norms: call it for the L1 norms of the keys in the layer that ``Policy.attention_from`` names, mean over
            heads, rotary positions included: float32 ``[B, V]`` of the visual and ``[B, R]`` of the question tokens.
        peak_attention: call it for the attention that each visual token receives from the question tokens and from the
            visual tokens: float32 ``[B, V]`` each, the largest of all heads, summed over the tokens that attend.
        sequence, slots: states ``[B, n, d]`` of all tokens and int64 ``[B, V]``, the place of each visual slot in them
            (0 for padding), for policies that read rows where they are; None where a row holds several prompts. The
            runtime gathers ``hidden_states`` and ``text_state`` when a policy first asks for them.
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
    text_states: Callable[[], TextStates] = _without_text
    key_norms: Callable[[], tuple[Tensor, Tensor]] = _without_attention
    peak_attention: Callable[[], tuple[Tensor, Tensor]] = _without_attention
    sequence: Tensor | None = None
    slots: Tensor | None = None

    def of_original(self, values: Tensor) -> Tensor:
        """Pick ``values`` of original visual tokens, ``[B, max(num_visual)]``, for this stage's slots: ``[B, V]``."""
        return values.gather(1, self.visual_index.clamp(min=0))


class Decision(NamedTuple):
    """What a stage decides.

    Attributes:
        scores: ``[B, V]``, the larger the more worth keeping; or keep and drop logits ``[B, V, 2]``, whose difference
            that is.
        keep_mask: ``[B, V]`` for policies that do not take the top-k of ``scores``.
        states: ``[B, V, d]``, new states of the visual slots, for policies that merge tokens. A stage that drops
            nothing changes nothing.
        deepstack: planes ``[B, V, d]`` that are added to the visual slots between later layers, in place of the model's
            own features (Qwen3-VL and its kin), as many as the model adds after the first stage; () leaves those.
    """

    scores: Tensor
    keep_mask: Tensor | None = None
    states: Tensor | None = None
    deepstack: tuple[Tensor, ...] = ()

    @property
    def differences(self) -> Tensor:
        """Scores ``[B, V]``, of logits in float32 at least."""
        return score_difference(self.scores)


class Policy:
    """Base of all policies: override ``score``; the pruner keeps the ``num_keep`` best tokens of each prompt.

    Attributes:
        attention_from: "none" when attention is never asked for; "previous" for the attention inside layer ``layer -
            1`` (FastV), "current" for that of layer ``layer`` over the states that are about to enter it (PyramidDrop).
        positions: "original" when survivors keep their positions; "renumbered" when they and all after them get
            consecutive ones, in which decoding goes on. M-RoPE positions (Qwen) are places in the image and always
            stay. Mode "mask" removes nothing, so it has original positions only.
        uses_text: whether the decision depends on anything but the visual tokens. Set it to False to let the policy
            prune a prompt that ends in an image, so that one image cache serves many questions.
        bounded_mask_grad: of a floating keep_mask in mode "mask", see ``toprl_kernels.masked_attention``.
    """

    attention_from: str = "none"
    positions: str = "original"
    uses_text: bool = True
    bounded_mask_grad: bool = False

    def score(self, context: StageContext) -> Tensor:
        """Return scores ``[B, V]``, the larger the more worth keeping; NaN ranks last."""
        raise NotImplementedError

    def decide(self, context: StageContext) -> Decision:
        """Return the stage's decision; by default the top-k of ``score``."""
        return Decision(self.score(context))

    def counts(self, schedule: Schedule, num_visual: int) -> tuple[int, ...]:
        """Count the tokens after each stage of a prompt with ``num_visual`` visual tokens, merged ones included."""
        return schedule.counts(num_visual)

    def at_stage(self, stage: int) -> Policy:
        """Return the policy that decides at ``stage``: this one, unless it is composed of several."""
        return self

    def hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Register module hooks, which are removed at ``detach``; return their handles."""
        return []

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        """Raise ValueError when the policy does not fit the model or the schedule; ``attach`` calls it first."""


def __getattr__(name: str) -> Any:
    if name in ("TopRLPolicy", "model_signature", "text_scores", "CONDITIONS"):
        raise ImportError(f"toprl_models.policy has no {name}: import it from toprl_models.methods.toprl")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
