"""prune_stage: contract, checks, registration, dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toprl_kernels import dispatch as check
from toprl_kernels.cache.api import gather_rows
from toprl_kernels.dispatch import choose, implementation, register
from toprl_kernels.stage.reference import PruneStageOutput, Selected, StageCall, prune_stage_reference
from toprl_kernels.topk.api import MAX_TRITON_TOKENS

OP = "prune_stage"
MAX_TABLES = 3


def prune_stage(
    hidden_states: Tensor,
    scores: Tensor,
    columns: Tensor,
    k: int | Tensor,
    *,
    length: int | None = None,
    width: int | None = None,
    valid_mask: Tensor | None = None,
    origins: Tensor | None = None,
    raster: Tensor | None = None,
    position_ids: Tensor | None = None,
    tables: Sequence[Tensor] = (),
    padding_side: str = "right",
    backend: str | None = None,
) -> PruneStageOutput:
    """Prune a sequence: of the tokens with a score the k best stay, and every token without one.

    The scored tokens are the visual ones, the others text. The selection is that of :func:`toprl_kernels.topk_compact`
    (ties to the lowest index, NaN last). One launch selects, a second gathers the rows of hidden states and tables; six
    launches above 4,096 tokens. Nothing waits for the GPU, so that a stage can be captured in a CUDA graph.
    Differentiable in hidden_states.

    Args:
        hidden_states: [B, N, d], any dtype, as in topk_compact.
        scores: [B, V] floating, or the actor's logits [B, V, 2]: keep minus drop logit, in float32.
        columns: [B, N] int64, the column of ``scores`` of each token; -1: the token has none and stays. The columns of
            a sample ascend with its tokens.
        k: scored tokens to keep: an int, or an integer tensor [B].
        length: output length K; it must hold what stays of every sample. Default for an int k: N - V + k, which fits
            samples without padding.
        width: length W of the lists of kept scored tokens, at least max(k). Default for an int k: k.
        valid_mask: [B, N] bool, False = padding, which is dropped.
        origins: [B, N] int64, index of each token before all stages (default: its index now).
        raster: [B, V] int64, raster number of each scored token (default: its column).
        position_ids: [..., B or 1, N0] integer, over the tokens before all stages; picked by origin.
        tables: at most 3 of [B or 1, N0, w], any dtype (rotary cos and sin); rows picked by origin, without a gradient.
        padding_side: "right" or "left", where a sample that keeps fewer than K tokens is padded.
        backend: None, "auto", "eager", "triton" or "reference"; see :mod:`toprl_kernels.dispatch`.

    Returns:
        PruneStageOutput. Its columns, origins, slots and raster are what the next stage begins with.

    Raises:
        TypeError: wrong dtypes; a bool k.
        ValueError: wrong shapes or devices; k or length out of range; a tensor k without length and width; more than 3
            tables.
        RuntimeError: backend="triton" cannot run, as in topk_compact.
        NotImplementedError: under torch.vmap; inputs with forward-mode tangents.

    Example:
        >>> import torch
        >>> from toprl_kernels import prune_stage
        >>> hidden = torch.arange(5.0).view(1, 5, 1)  # text, three visual tokens, text
        >>> out = prune_stage(hidden, torch.tensor([[0.2, 0.9, 0.4]]), torch.tensor([[-1, 0, 1, 2, -1]]), 2)
        >>> out.hidden_states.flatten().tolist(), out.columns.tolist(), out.slots.tolist()
        ([0.0, 2.0, 3.0, 4.0], [[-1, 0, 1, -1]], [[1, 2]])
    """
    check.require(OP, "hidden_states", hidden_states, "[B, N, d]", 3)
    batch, num_tokens, device = hidden_states.shape[0], hidden_states.shape[1], hidden_states.device
    num_scores = scores.shape[1] if isinstance(scores, Tensor) and scores.ndim > 1 else -1
    shape = (batch, num_scores, 2) if isinstance(scores, Tensor) and scores.ndim == 3 else (batch, num_scores)
    check.require(OP, "scores", scores, "[B, V] or [B, V, 2]", shape, check.FLOATS, device, "use scores.float()")
    shape = (batch, num_tokens)
    check.require(OP, "columns", columns, "[B, N]", shape, check.LONG, device, "use columns.long()")
    check.require_given(OP, "valid_mask", valid_mask, "[B, N]", shape, check.BOOL, device, "use valid_mask.bool()")
    check.require_given(OP, "origins", origins, "[B, N]", shape, check.LONG, device, "use origins.long()")
    if raster is None:
        raster = torch.arange(num_scores, device=device).expand(batch, -1)
    check.require(OP, "raster", raster, "[B, V]", (batch, num_scores), check.LONG, device, "use raster.long()")
    check.require_ints(OP, length=length, width=width)
    if position_ids is not None:
        layout = "[..., B or 1, N0]"
        planes = 3 if getattr(position_ids, "ndim", 2) == 3 else 2
        check.require(OP, "position_ids", position_ids, layout, planes, check.INTEGERS, device, "use .long()")
        if position_ids.shape[-2] not in (1, batch):
            raise ValueError(f"{OP}: position_ids must be {layout}, got shape {tuple(position_ids.shape)}")
    if len(tables) > MAX_TABLES:
        raise ValueError(f"{OP}: tables has {len(tables)} tensors, at most {MAX_TABLES}; gather others by out.origins")
    for number, table in enumerate(tables):
        check.require(OP, f"tables[{number}]", table, "[B or 1, N0, w]", 3, (), device)
    if padding_side not in ("right", "left"):
        raise ValueError(f"{OP}: padding_side={padding_side!r} is unknown; use 'right' or 'left'")
    counts = None
    if isinstance(k, Tensor):
        check.require_counts(OP, k, "[B] (or pass an int)", (batch,), device)
        if length is None or width is None:
            raise ValueError(f"{OP}: a tensor k needs length= and width=, so that nothing waits for the device")
        counts = k.to(device=device, dtype=torch.int64).clamp(0, width)
    elif isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{OP}: k must be an int or an int64 tensor [B], got {k!r} of type {type(k).__name__}")
    elif not 0 <= k <= num_scores:
        raise ValueError(f"{OP}: k={k} is outside 0..V={num_scores}; use min(k, scores.shape[1])")
    else:
        length, width = num_tokens - num_scores + k if length is None else length, k if width is None else width
    if not (0 <= length <= num_tokens and 0 <= width <= min(num_scores, num_tokens)):
        raise ValueError(f"{OP}: length={length} must be in 0..N={num_tokens}, width={width} in 0..V={num_scores}")

    obstacle = None
    if hidden_states.dtype.is_complex or scores.dtype == torch.float64:
        obstacle = "hidden_states are complex or scores float64; the kernels take real ones and at most float32"
    elif num_tokens > MAX_TRITON_TOKENS:
        obstacle = f"N={num_tokens} tokens, the kernels take N <= {MAX_TRITON_TOKENS}"
    choice = choose(OP, backend, device, obstacle)
    left, limit = padding_side == "left", width if isinstance(k, Tensor) else k
    call = StageCall(
        scores.detach(), columns, counts, limit, length, width, valid_mask, origins, raster, position_ids, left
    )
    *chosen, positions = prune_stage_reference(call) if choice.name == "reference" else _op(*call, choice.name)
    # a table of one row serves all samples, by a stride of 0
    rows = [hidden_states, *(table.detach().expand(batch, -1, -1) for table in tables)]
    gathered = gather_rows([part.unsqueeze(1) for part in rows], chosen[0], chosen[3], choice.name)
    hidden, *gathered = (part.squeeze(1) for part in gathered)
    return PruneStageOutput._make([hidden, *chosen, None if position_ids is None else positions, tuple(gathered)])


def _select(*arguments: Any) -> Selected:
    return implementation("stage", "prune_stage", arguments[-1])(StageCall(*arguments[:-1]))


def _fake(*arguments: Any) -> Selected:
    x = StageCall(*arguments[:-1])
    samples = x.columns.shape[0]
    indices, slots = x.columns.new_empty(samples, x.length), x.columns.new_empty(samples, x.width)
    valid, listed = (torch.empty_like(each, dtype=torch.bool) for each in (indices, slots))
    positions = x.columns.new_empty(0)
    if x.position_ids is not None:
        positions = x.position_ids.new_empty(*x.position_ids.shape[:-2], samples, x.length)
    new = torch.empty_like
    return indices, valid, new(indices), new(indices), slots, new(slots), listed, positions


_op = register(
    "prune_stage(Tensor scores, Tensor columns, Tensor? k, SymInt limit, SymInt length, SymInt width, "
    "Tensor? valid_mask, Tensor? origins, Tensor raster, Tensor? position_ids, bool left, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _select,
    _fake,
)
