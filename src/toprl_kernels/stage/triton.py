"""prune_stage in two launches: selection, with all that is a number per token, and the gather of rows."""

from __future__ import annotations

from toprl_kernels.stage.eager import Outputs
from toprl_kernels.stage.reference import StageCall
from toprl_kernels.topk.triton import gather_heads, select_tokens


def prune_stage_triton(x: StageCall) -> Outputs:
    """Same contract as :func:`prune_stage_eager`."""
    options = x._asdict()
    hidden_states, tables = options.pop("hidden_states"), options.pop("tables")
    samples, num_tokens = x.columns.shape
    out = select_tokens(num_tokens=num_tokens, **options)
    # a table of one row serves all samples, by a stride of 0
    rows = [hidden_states[:, None], *(table.expand(samples, -1, -1)[:, None] for table in tables)]
    hidden, *gathered = (moved[:, 0] for moved in gather_heads(rows, out["indices"], out["origins"]))
    names = ("indices", "valid", "columns", "origins", "slots", "raster", "listed", "positions")
    indices, valid, new_columns, before, slots, numbers, listed, positions = (out[name] for name in names)
    return hidden, indices, valid, new_columns, before, slots, numbers, listed, positions, gathered
