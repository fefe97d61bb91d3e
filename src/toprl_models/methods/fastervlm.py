"""FasterVLM (Zhang et al., arXiv 2412.01818, "[CLS] attention is all you need for ... visual token pruning")."""

from __future__ import annotations

from torch import Tensor

from toprl_models.methods._tower import KEPT, TowerPolicy, after_first_layers
from toprl_models.policy import StageContext
from toprl_models.registry import BEFORE_LLM, register_method


@register_method(
    "fastervlm",
    "FasterVLM",
    "Zhang et al., arXiv 2412.01818",
    stages=BEFORE_LLM,
    refuses=after_first_layers,
    inputs=("images",),
)
class FasterVLM(TowerPolicy):
    """Keep the patches that the vision tower attended to most.

    Score: attention of the class token to the patches in the layer whose output the projector gets (layer L - 2 of the
    released LLaVAs), softmax over all tokens, mean over heads. Each tile keeps its own best after the projector, and
    survivors get consecutive positions, as the authors' tokens have them, which are removed before the language model.

    The authors need a class token. Without one (SigLIP, Qwen, Pixtral) the score is the attention that a patch receives
    from all patches, as in VisionZip; of merged patches it is the mean (``TowerPolicy``).

    The tokens of a row are shared among its tiles (of all its images) by ``tile_shares``, in proportion to the tokens
    that the tower made of each: a tile that unpadding left with fewer than its share keeps all of them. Newline
    features are no patches: they go first, and stay only where there are more tokens to keep than patches.

    Deviations: the authors' attention is in the model's precision, here the softmax stays in float32. On LLaVA-NeXT the
    authors' tiles are not unpadded; here patches that the model itself leaves out cannot be kept.

    Errors and use are those of ``TowerPolicy``.
    """

    def score(self, context: StageContext) -> Tensor:
        """Score by attention, float32 ``[B, V]``; 2 more for what a tile keeps, -1 for newlines and padding."""
        reading = self._reader.read(self, context)
        scores = reading.scores.clone()
        for slots, share in zip(reading.slots_of_tiles(), reading.shares(context.num_keep), strict=True):
            best = scores.view(-1)[slots].argsort(descending=True, stable=True)[:share]
            scores.view(-1)[slots[best]] += KEPT
        return scores.repeat_interleave(reading.repeats, 0)
