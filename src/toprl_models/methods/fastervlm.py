"""FasterVLM (Zhang et al., arXiv 2412.01818, "[CLS] attention is all you need for ... visual token pruning")."""

from __future__ import annotations

from torch import Tensor

from toprl_models.methods._tower import KEPT, ClassTokenPolicy, no_choice_by_class_token
from toprl_models.policy import StageContext
from toprl_models.registry import BEFORE_LLM, register_method


@register_method(
    "fastervlm", "FasterVLM", "Zhang et al., arXiv 2412.01818", stages=BEFORE_LLM, refuses=no_choice_by_class_token
)
class FasterVLM(ClassTokenPolicy):
    """Keep the patches that the vision tower's class token attended to most.

    Score: attention of the class token to the patches in the layer whose output the projector gets (layer L - 2 of the
    released LLaVAs), softmax over all tokens, mean over heads. Each tile keeps its own best after the projector, and
    survivors get consecutive positions, as the authors' tokens have them, which are removed before the language model.

    The tokens of a row are shared evenly among its tiles (of all its images) by ``tile_shares``: a tile that unpadding
    left with fewer patches than its share keeps all of them. Newline features of LLaVA-NeXT are no patches: they go
    first, and stay only where there are more tokens to keep than patches.

    Deviations: the authors' attention is in the model's precision, here the softmax stays in float32. On LLaVA-NeXT the
    authors' tiles are not unpadded; here patches that the model itself leaves out cannot be kept.

    Errors and use are those of ``ClassTokenPolicy``.
    """

    def score(self, context: StageContext) -> Tensor:
        """Score by attention, float32 ``[B, V]``; 2 more for what a tile keeps, -1 for newlines and padding."""
        reading = self._reader.read(self, context)
        attention = reading.attention.mean(1)  # [T, P]
        best = attention.masked_fill(reading.patch_slot < 0, -1).argsort(dim=1, descending=True, stable=True)
        shares = best.new_tensor(reading.shares(context.num_keep))
        is_kept = best.argsort(dim=1) < shares[:, None]
        scores = reading.of_slots(attention + KEPT * is_kept, missing=-1)
        return scores.repeat_interleave(reading.repeats, 0)
