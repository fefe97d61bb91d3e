"""prune_stage's selection, with all that is a number per token, in one launch."""

from __future__ import annotations

from toprl_kernels.stage.reference import Selected, StageCall
from toprl_kernels.topk.triton import select_tokens


def prune_stage_triton(x: StageCall) -> Selected:
    """Same contract as :func:`prune_stage_eager`."""
    out = select_tokens(num_tokens=x.columns.shape[1], **x._asdict())
    return (
        out["indices"], out["valid"], out["columns"], out["origins"], out["slots"], out["raster"], out["listed"],
        out["positions"],
    )  # fmt: skip
