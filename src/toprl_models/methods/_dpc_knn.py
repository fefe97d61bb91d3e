"""DPC-KNN: density peaks clustering over nearest neighbours (Du et al., Knowledge-Based Systems 2016), batched."""

from __future__ import annotations

import torch
from torch import Tensor

# Added to densities so that equal points are ordered
NOISE = 1e-6
GOLDEN_RATIO = 0.6180339887


def dpc_knn(states: Tensor, valid: Tensor, num_clusters: Tensor, max_clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster the points of each row.

    Distances are Euclidean, divided by sqrt(d). A point's density is exp(-mean of its C smallest squared distances),
    the 0 to itself among them, plus noise. Its score is the density times the distance to the nearest denser point (the
    densest point: the largest distance of the row); the C best are the centres, and each point joins the nearest one.

    Deviation from SparseVLM's code, where the noise is drawn anew in each call: here it is a fixed sequence, spread
    evenly over [0, 1e-6) and the same for every row, so that a point's cluster depends on nothing but the row.

    Args:
        states: points ``[B, n, d]``, any float dtype; computed in float32.
        valid: bool ``[B, n]``, False for padding, which may stand anywhere.
        num_clusters: int64 ``[B]``, C of each row, at most its valid points; 0 for a row that is not clustered.
        max_clusters: the largest of them, on the host.

    Returns:
        Assignment, int64 ``[B, n]``: numbers below C in descending order of the centres' scores, -1 for padding and
        rows without clusters. Centres, int64 ``[B, max_clusters]``: their places in the row, -1 where a row has fewer.
    """
    batch, length, width = states.shape
    points = states.float()
    # not by matrix product: that leaves rounding on the distance of equal points
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / width**0.5
    pairs = valid[:, :, None] & valid[:, None]

    nearest = distance.masked_fill(~pairs, torch.inf).sort(-1).values[..., :max_clusters]
    rank = torch.arange(max_clusters, device=states.device)
    counted = rank < num_clusters[:, None]  # [B, C]
    squares = torch.where(counted[:, None], nearest.square(), 0.0).sum(-1)
    density = (-squares / num_clusters.clamp(min=1)[:, None]).exp()
    noise = torch.arange(1, length + 1, device=states.device) * GOLDEN_RATIO % 1
    density = density + NOISE * noise

    farthest = distance.masked_fill(~pairs, 0).flatten(1).amax(1)[:, None, None]
    denser = pairs & (density[:, None] > density[:, :, None])
    peak = torch.where(denser, distance, farthest).amin(-1)
    score = (density * peak).masked_fill(~valid, -torch.inf)
    centres = score.sort(dim=-1, descending=True, stable=True).indices[:, :max_clusters]

    to_centres = distance.gather(2, centres[:, None].expand(-1, length, -1))
    assignment = to_centres.masked_fill(~counted[:, None], torch.inf).argmin(-1)
    # a centre is in the cluster it makes, even where another centre is the same point
    places = torch.where(counted, centres, length)
    of_centre = assignment.new_full((batch, length + 1), -1).scatter(1, places, rank.expand(batch, -1))[:, :length]
    assignment = torch.where(of_centre >= 0, of_centre, assignment)
    assignment = assignment.masked_fill(~(valid & (num_clusters > 0)[:, None]), -1)
    return assignment, centres.masked_fill(~counted, -1)


def cluster_means(states: Tensor, assignment: Tensor, max_clusters: int) -> Tensor:
    """Average the points of each cluster: ``[B, max_clusters, d]`` in the dtype of ``states``; zeros for none.

    The points ``states`` [B, n, d] are summed in float32 at least; int64 ``assignment`` [B, n] is that of ``dpc_knn``.
    """
    member = (assignment[:, None] == torch.arange(max_clusters, device=states.device)[:, None]).float()  # [B, C, n]
    # padding may hold anything, and 0 * inf is not 0
    points = states.to(torch.promote_types(states.dtype, torch.float32)).masked_fill((assignment < 0)[..., None], 0)
    return ((member.to(points.dtype) @ points) / member.sum(-1, keepdim=True).clamp(min=1)).to(states.dtype)
