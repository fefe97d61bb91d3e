"""DyCoke (Tao et al., CVPR 2025, "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models")."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from toprl_models.methods._video import VideoPolicy, portions, without_frames
from toprl_models.registry import BEFORE_LLM, register_method


@register_method(
    "dycoke", "DyCoke", "Tao et al., CVPR 2025", stages=BEFORE_LLM, refuses=without_frames, inputs=("videos",)
)
class DyCoke(VideoPolicy):
    """Keep every fourth frame of a video, and of the others the tokens that changed most since an earlier one.

    Of each four frames the first stays whole; the second is compared with the first, the third with the first and the
    fourth with the third, by the cosine of tokens of the same place, and the tokens with the smallest ones stay, as
    many of each of these frames. This is the temporal merging of the paper; its eviction of cached tokens during
    decoding is another mechanism.

    Deviations: the authors give the share that is dropped, here it follows from the budget; where that is less than
    every fourth frame, these lose tokens, too, the later ones of each frame. Their code leaves out the third frame of
    the last four.

    Errors and use are those of ``VideoPolicy``.
    """

    def rank(self, video: Tensor, keep: int) -> Tensor:
        frames, tokens = video.shape[:2]
        whole = [frame for frame in range(frames) if frame % 4 == 0]
        others = [frame for frame in range(frames) if frame % 4]
        taken = torch.zeros(frames, tokens, device=video.device)
        shares = portions(min(keep, len(whole) * tokens), [1.0] * len(whole), tokens)
        for frame, share in zip(whole, shares, strict=True):
            taken[frame, :share] = 1
        left = max(keep - len(whole) * tokens, 0)
        for frame, share in zip(others, portions(left, [1.0] * len(others), tokens), strict=True):
            earlier = frame - 2 if frame % 4 == 2 else frame - 1
            cosine = cosine_similarity(video[frame], video[earlier], dim=-1)
            taken[frame, cosine.argsort(stable=True)[:share]] = 1
        return taken
