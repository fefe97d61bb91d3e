"""VidCom2 (Liu et al., EMNLP 2025, "Video Compression Commander: Plug-and-Play Inference Acceleration ...")."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from toprl_models.methods._video import VideoPolicy, portions, without_frames
from toprl_models.registry import BEFORE_LLM, register_method

# Twice the variances of the kernels, and the temperature of the frames' softmax
WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
TEMPERATURE = 0.01


@register_method(
    "vidcom2", "VidCom2", "Liu et al., EMNLP 2025", stages=BEFORE_LLM, refuses=without_frames, inputs=("videos",)
)
class VidCom2(VideoPolicy):
    """Give frames that are unlike the video more tokens, and keep in each those unlike the video and the frame.

    Likeness is a sum of Gaussian kernels of the distance from the mean over the video, or over the frame, of unit
    vectors: of the half of the channels that vary least. A frame's share is in proportion to 1 + p - mean(p), where p
    is the softmax over frames of minus the mean likeness to the video, divided by 0.01. A frame keeps the tokens whose
    two likenesses have the smallest sum.

    Deviation: the authors round each frame's number, and give it one token at least; here the numbers add up to the
    budget, and a frame gets no more than it has.

    Errors and use are those of ``VideoPolicy``.
    """

    def rank(self, video: Tensor, keep: int) -> Tensor:
        to_video, to_frame = likeness(video)
        unlike = (-to_video.mean(1) / TEMPERATURE).softmax(0)
        shares = portions(keep, (1 + unlike - unlike.mean()).tolist(), video.shape[1])
        order = (to_video + to_frame).argsort(dim=1, stable=True).argsort(1)
        taken = order < torch.tensor(shares, device=order.device)[:, None]
        return taken.float() - order / video.shape[1]


def likeness(video: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the likeness of tokens ``[t, n, d]`` to the video and to their frame: ``[t, n]`` each."""
    variance = video.flatten(0, 1).var(0, unbiased=False)
    steady = variance.argsort(stable=True)[: video.shape[2] // 2]
    unit = normalize(video[..., steady], dim=-1)
    means = unit.mean((0, 1)), unit.mean(1, keepdim=True)
    to_video, to_frame = ((unit - mean).square().sum(-1) for mean in means)
    return kernels(to_video), kernels(to_frame)


def kernels(squares: Tensor) -> Tensor:
    """Sum Gaussian kernels of several widths over squared distances."""
    return torch.stack([(-squares / (2 * width)).exp() for width in WIDTHS]).sum(0)
