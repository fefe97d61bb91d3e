"""DART (Wen et al., EMNLP 2025, "Stop Looking for Important Tokens in Multimodal Language Models")."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from toprl_models.policy import Policy, StageContext
from toprl_models.probe import decoder_of
from toprl_models.registry import register_method

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from toprl_models.schedule import Schedule


@register_method("dart", "DART", "Wen et al., EMNLP 2025", stages=(2,))
class DART(Policy):
    """Keep a few pivots and the tokens that resemble them least.

    Pivots are the visual tokens and the question tokens with the largest keys (L1 norm over all heads, rotary positions
    included) in the layer before the stage. One after the other, each pivot picks its share of the tokens that are
    left: those with the smallest cosine to it, of states behind the decoder's final norm. Pivots that are visual tokens
    stay as well. The authors prune once, before layer 2, and keep original positions.

    Deviations: the authors take the pivots in the order of a Python set, here visual ones come first and each kind is
    in the order of the prompt. The shares of the authors are the budget divided by the number of pivots and rounded
    down, so that 128 tokens are 4 + 8 * 15; here pivots and shares are exactly the budget.

    One instance serves one attached model at a time.

    Args:
        visual_pivots: number of visual tokens among the pivots.
        text_pivots: number of question tokens among them, or all that there are.

    Raises:
        ValueError: fewer than one visual pivot or a negative number; by ``attach``, a decoder without a final norm.
    """

    attention_from = "previous"

    def __init__(self, visual_pivots: int = 4, text_pivots: int = 4) -> None:
        if visual_pivots < 1 or text_pivots < 0:
            raise ValueError(f"visual_pivots={visual_pivots} must be positive, text_pivots={text_pivots} not negative")
        self.visual_pivots, self.text_pivots = visual_pivots, text_pivots

    def check(self, model: PreTrainedModel, schedule: Schedule) -> None:
        final_norm(model)

    def hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        # a detached policy must not keep the model alive
        self._norm = weakref.ref(final_norm(model))
        return []

    def score(self, context: StageContext) -> Tensor:
        """Score a token by minus the place at which it is picked: 0, -1, ...; -V for tokens that are not."""
        visual_keys, text_keys = context.key_norms()
        norm = self._norm()
        assert norm is not None
        with torch.no_grad():
            visual, text = norm(context.hidden_states), norm(context.text_states().states)
        order = torch.full_like(context.valid_mask, context.valid_mask.shape[1], dtype=torch.int64)
        are_text = context.text_states().valid
        for row, keep in enumerate(context.num_keep):
            slots, asked = context.valid_mask[row].nonzero()[:, 0], are_text[row].nonzero()[:, 0]
            picks = self.picks(
                visual[row, slots], text[row, asked], visual_keys[row, slots], text_keys[row, asked], keep
            )
            order[row, slots[picks]] = torch.arange(len(picks), device=order.device)
        return -order.float()

    def picks(self, visual: Tensor, text: Tensor, visual_keys: Tensor, text_keys: Tensor, keep: int) -> Tensor:
        """Pick ``keep`` of the visual tokens of a prompt: int64 ``[keep]``.

        ``visual`` [n, d] and ``text`` [R, d] are states, ``visual_keys`` [n] and ``text_keys`` [R] norms of keys.
        """
        first = visual_keys.topk(min(self.visual_pivots, keep, len(visual))).indices.sort().values
        asked = text_keys.topk(min(self.text_pivots, len(text))).indices.sort().values
        pivots, picks = torch.cat([visual[first], text[asked]]), [first]
        left = torch.ones(len(visual), dtype=torch.bool, device=visual.device)
        left[first] = False
        wanted = min(keep, len(visual)) - len(first)
        for number, pivot in enumerate(pivots):
            share = wanted // len(pivots) + (number < wanted % len(pivots))
            cosine = cosine_similarity(pivot[None].float(), visual.float()).masked_fill(~left, torch.inf)
            picks.append(cosine.argsort(stable=True)[:share])
            left[picks[-1]] = False
        return torch.cat(picks)


def final_norm(model: PreTrainedModel) -> nn.Module:
    """Find the norm that the decoder applies to its last layer's output.

    Raises:
        ValueError: the decoder has none under the names that transformers gives it.
    """
    decoder = decoder_of(model)
    for name in ("norm", "final_layernorm", "embedding_norm"):
        if isinstance(found := getattr(decoder, name, None), nn.Module):
            return found
    raise ValueError(f"model: {type(decoder).__name__} has no final norm that DART could compare states behind")
