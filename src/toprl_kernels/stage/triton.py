"""prune_stage in two launches: selection, with all that is a number per token, and the gather of rows."""

from __future__ import annotations

from torch import Tensor

from toprl_kernels.stage.eager import Outputs
from toprl_kernels.topk.triton import gather_heads, select_tokens


def prune_stage_triton(
    hidden_states: Tensor,
    scores: Tensor,
    columns: Tensor,
    k: Tensor | None,
    limit: int,
    length: int,
    width: int,
    valid_mask: Tensor | None,
    origins: Tensor | None,
    raster: Tensor,
    position_ids: Tensor | None,
    tables: list[Tensor],
    left: bool,
) -> Outputs:
    """Same contract as :func:`prune_stage_eager`."""
    out = select_tokens(
        scores, columns.shape[1], length, k=k, limit=limit, valid_mask=valid_mask, position_ids=position_ids, left=left,
        columns=columns, origins=origins, raster=raster, width=width,
    )  # fmt: skip
    # a table of one row serves all samples, by a stride of 0
    rows = [hidden_states[:, None], *(table.expand(len(columns), -1, -1)[:, None] for table in tables)]
    hidden, *gathered = (moved[:, 0] for moved in gather_heads(rows, out["indices"], out["origins"]))
    names = ("indices", "valid", "columns", "origins", "slots", "raster", "listed", "positions")
    indices, valid, new_columns, before, slots, numbers, listed, positions = (out[name] for name in names)
    return hidden, indices, valid, new_columns, before, slots, numbers, listed, positions, gathered
