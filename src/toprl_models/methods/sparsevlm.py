"""SparseVLM (Zhang et al., ICML 2025, "SparseVLM: Visual Token Sparsification for Efficient VLM Inference"), v1.5."""

from __future__ import annotations

import torch
from torch import Tensor

from toprl_models.methods._dpc_knn import cluster_means, dpc_knn
from toprl_models.policy import Decision, Policy, StageContext
from toprl_models.registry import register_method
from toprl_models.runtime.state import gather_slots
from toprl_models.schedule import Schedule


@register_method(
    "sparsevlm",
    "SparseVLM",
    "Zhang et al., ICML 2025",
    stages=(3, 7, 16),
    merges=True,
    authors={192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
)
class SparseVLM(Policy):
    """Keep the tokens that the question's visual words attend to most, and merge the best of the others.

    Raters: of the text tokens after the images, those whose share in softmax over text of V T^t, mean over the visual
    tokens, is above the mean share; V and T are the embeddings that enter layer 0. Score: attention of the raters in
    the layer before the stage, mean over heads and raters. Recycling: of the n dropped tokens the int(.3 n) + 1 best
    are clustered by DPC-KNN on the layer's output, int(m / 10) + 1 clusters of m tokens, and each cluster's mean
    is a token after the kept visual ones. So there are more tokens after a stage than the schedule says (``counts``).

    The authors prune once layers 2, 6 and 15 (0-based) of 32 have run, on their full input: stages before layers 3, 7
    and 16. They keep 300/200/110 of 576 tokens for what they call 192, 303/110/36 for 128, 66/30/17 for 64, and
    recycle on top of it.

    Deviations: DPC-KNN's noise is fixed (see ``dpc_knn``); where no text token is above the mean (one token, or equal
    ones) all of them rate, where the authors' mean is over nothing; each row of a batch has its own raters and counts.

    Merged tokens take slots of dropped ones, the last of the row, and the kept tokens after such a slot move up, so
    that kept tokens in raster order come first, then the merged. Positions are renumbered, so the slot taken does not
    matter; with M-RoPE (Qwen), where positions stay, those tokens get the positions of their new slots.
    ``StageTrace.indices`` name the slots. If a row would recycle everything it drops (one token), it stays as it is.

    Args:
        recycle: False drops the tokens that would be merged.
    """

    attention_from = "previous"
    positions = "renumbered"

    def __init__(self, recycle: bool = True) -> None:
        self.recycle = recycle

    def counts(self, schedule: Schedule, num_visual: int) -> tuple[int, ...]:
        """Count the kept and merged tokens after each stage.

        Example:
            >>> SparseVLM().counts(Schedule(((3, 300), (7, 200), (16, 110))), 576)
            (309, 204, 113)
        """
        if not self.recycle:
            return schedule.counts(num_visual)
        counts, left = [], num_visual
        for wanted in schedule.counts(num_visual):
            kept = min(wanted, left)
            left = kept + num_clusters(left - kept)
            counts.append(left)
        return tuple(counts)

    def score(self, context: StageContext) -> Tensor:
        raters = find_raters(context)[..., None]
        return (context.text_attention() * raters).sum(1) / raters.sum(1).clamp(min=1)

    def decide(self, context: StageContext) -> Decision:
        scores = self.score(context)
        return recycled(context, scores) if self.recycle else Decision(scores)


def find_raters(context: StageContext) -> Tensor:
    """Mark the text tokens after the images that are most like the visual tokens: bool ``[B, R]``."""
    prompt = context.prompt()
    likeness = prompt.visual.float() @ prompt.text.float().transpose(1, 2)  # [B, V0, R]
    # finite, so that a row without text is 0 and not NaN
    share = likeness.masked_fill(~prompt.text_valid[:, None], torch.finfo(torch.float32).min).softmax(-1)
    seen = prompt.visual_valid[..., None]
    share = (share * seen).sum(1) / seen.sum(1).clamp(min=1)
    num_text = prompt.text_valid.sum(1, keepdim=True)
    mean = (share * prompt.text_valid).sum(1, keepdim=True) / num_text.clamp(min=1)
    raters = (share > mean) & prompt.text_valid
    return torch.where(raters.any(1, keepdim=True), raters, prompt.text_valid)


def num_merged(dropped: int) -> int:
    """Count the dropped tokens that are clustered."""
    return int(dropped * 0.3) + 1 if dropped else 0


def num_clusters(dropped: int) -> int:
    """Count the clusters that dropped tokens become."""
    return int(num_merged(dropped) / 10) + 1 if dropped else 0


def recycled(context: StageContext, scores: Tensor) -> Decision:
    """Keep ``num_keep`` tokens per row by ``scores`` ``[B, V]`` and merge the best of the others."""
    states, valid = context.hidden_states, context.valid_mask
    width, device = valid.shape[1], valid.device
    most = width - min(context.num_keep)  # that a row can drop
    if not most:
        return Decision(scores)
    # numbers of each row from tables, without waiting for the device
    keep = torch.tensor(context.num_keep).to(device, non_blocking=True)
    dropped = valid.sum(1) - keep
    merged, clusters = (
        torch.tensor([number(n) for n in range(most + 1)]).to(device, non_blocking=True)[dropped]
        for number in (num_merged, num_clusters)
    )

    order = scores.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    kept = order.argsort(1) < keep[:, None]
    rank = torch.arange(num_merged(most), device=device)
    candidates = order.gather(1, (keep[:, None] + rank).clamp(max=width - 1))
    points = gather_slots(states, candidates)
    assignment, _ = dpc_knn(points, rank < merged[:, None], clusters, num_clusters(most))
    means = cluster_means(points, assignment, num_clusters(most))

    free = valid & ~kept
    hosts = free & (free.flip(1).cumsum(1).flip(1) <= clusters[:, None])
    keep_mask = kept | hosts
    # the survivor at each place: a kept token, in raster order, or after those a merged token
    place = keep_mask.cumsum(1) - 1
    in_order = (~kept).to(torch.int8).argsort(dim=1, stable=True)
    after_kept = (width + place - keep[:, None]).clamp(max=width + means.shape[1] - 1)
    source = torch.where(place < keep[:, None], in_order.gather(1, place.clamp(min=0)), after_kept)
    source = torch.where((clusters < dropped)[:, None], source, torch.arange(width, device=device))
    return Decision(scores, keep_mask, gather_slots(torch.cat([states, means], 1), source))
