"""EVS (Bagrov et al., arXiv 2510.14624, "Efficient Video Sampling: Pruning Temporally Redundant Tokens ...")."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from toprl_models.methods._video import VideoPolicy, without_frames
from toprl_models.registry import BEFORE_LLM, register_method


@register_method("evs", "EVS", "arXiv 2510.14624", stages=BEFORE_LLM, refuses=without_frames, inputs=("videos",))
class EVS(VideoPolicy):
    """Keep the first frame of a video and the tokens that changed most since the frame before.

    Score: 1 - cosine with the token of the same place in the frame before; those of the first frame come first. So it
    stands in vLLM.

    Deviation: the authors keep the whole first frame whatever the budget is.

    Errors and use are those of ``VideoPolicy``.
    """

    def rank(self, video: Tensor, keep: int) -> Tensor:
        changes = (1 - cosine_similarity(video[1:], video[:-1], dim=-1)) / 2
        return pad(changes, (0, 0, 1, 0), value=1.0)
