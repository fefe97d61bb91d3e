"""Worker and model runner for pruning inside the decoder: vLLM's own, with shorter requests after each stage."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker import cpu_worker, gpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from toprl_models.integrations.vllm.options import KEY, PruningOptions
from toprl_models.integrations.vllm.pages import Counts, StageSpec


@dataclass
class Share:
    """A request's share of a step: tokens ``[computed, computed + scheduled)`` of it.

    Attributes:
        name: the request's id.
        computed, scheduled: tokens before this step and in it.
        prompt: tokens of the prompt.
        dropped: visual tokens that each stage leaves out, those of earlier stages included.
        visual: bool ``[scheduled]``, the visual tokens, where this step has the prompt; None where it has not, or the
            prompt has no images.
    """

    name: str
    computed: int
    scheduled: int
    prompt: int
    dropped: tuple[int, ...]
    visual: Tensor | None

    def entries(self, stage: int) -> tuple[int, int]:
        """Count the entries of the caches after ``stage``: before this step, and after it."""
        ends = (self.computed, self.computed + self.scheduled)
        return max(ends[0] - self.dropped[stage], 0), ends[1] - self.dropped[stage]


@dataclass
class _Rows:
    """The step as the layers after a stage see it."""

    queries: np.ndarray  # int32 [requests]
    lengths: np.ndarray  # int32 [requests], with this step's tokens
    request: np.ndarray  # int64 [rows]
    entry: np.ndarray  # int64 [rows], which entry of its request's cache a row becomes

    @classmethod
    def of(cls, shares: list[Share], stage: int) -> _Rows:
        # each of them contiguous: kernels read them as they lie
        entries = [share.entries(stage) for share in shares]
        before, lengths = (np.array(ends, np.int32) for ends in zip(*entries, strict=True))
        queries = lengths - before
        request = np.repeat(np.arange(len(shares)), queries)
        starts = np.cumsum(queries) - queries
        return cls(queries, lengths, request, np.arange(len(request)) - (starts - before)[request])


class StageRunner(GPUModelRunner):
    """Mixin of the model runners: slots and attention metadata of the layers after each stage."""

    _scheduled: dict[str, int] | None = None  # tokens of each request in the step that runs
    _rows: dict[int, _Rows]
    _counts: Counts | None = None

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._scheduled = scheduler_output.num_scheduled_tokens
        try:
            return super().execute_model(scheduler_output, *args, **kwargs)
        finally:
            self._scheduled, self._rows = None, {}
            self.get_model().staging.begin(None)

    def _shares(self) -> list[Share]:
        assert self._scheduled is not None
        if self._counts is None:
            config = self.model_config.hf_config
            self._counts = Counts(PruningOptions.stored_in(config), config)
        shares = []
        for name in self.input_batch.req_ids:
            state, scheduled = self.requests[name], self._scheduled[name]
            computed, prompt = state.num_computed_tokens, state.num_prompt_tokens
            visual = None
            if computed == 0 and state.mm_features:
                visual = torch.zeros(scheduled, dtype=torch.bool)
                for feature in state.mm_features:
                    at = feature.mm_position
                    visual[at.offset : at.offset + at.length] = True if at.is_embed is None else at.is_embed
            if computed < prompt and (computed or scheduled < prompt):
                raise RuntimeError(
                    f"{KEY}: prompt {name} was cut: tokens {computed}..{computed + scheduled} of {prompt}"
                )
            shares.append(Share(name, computed, scheduled, prompt, self._counts.of(state.mm_features), visual))
        return shares

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> Any:
        by_group, by_layer = super()._get_slot_mappings(*args, **kwargs)
        self._rows = {}
        if by_group is None or self._scheduled is None:  # a dummy run, which prunes nothing
            return by_group, by_layer
        shares = self._shares()
        self.get_model().staging.begin(shares)
        rows: dict[int, _Rows] = {}
        for number, group in enumerate(self.kv_cache_config.kv_cache_groups):
            spec = group.kv_cache_spec
            if not isinstance(spec, StageSpec):
                continue
            if spec.stage not in rows:
                rows[spec.stage] = _Rows.of(shares, spec.stage)
            self._rows[number] = its = rows[spec.stage]
            table = self.input_batch.block_table[number]
            page, place = np.divmod(its.entry, table.block_size)
            slots = table.block_table.np[its.request, page].astype(np.int64) * table.block_size + place
            by_group[number] = torch.from_numpy(slots).to(self.device, non_blocking=True)
            by_layer |= dict.fromkeys(group.layer_names, by_group[number])
        return by_group, by_layer

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        metadata, of_draft = super()._build_attention_metadata(*args, **kwargs)
        for number, rows in self._rows.items():
            common = self._common_metadata(number, rows, kwargs["slot_mappings"][number])
            for attention in self.attn_groups[number]:
                if hasattr(attention, "build_metadata"):
                    made = attention.build_metadata(common)
                else:  # vLLM 0.31, whose block tables have the kernels' blocks
                    made = attention.get_metadata_builder().build(0, common)
                metadata |= dict.fromkeys(attention.layer_names, made)
        return metadata, of_draft

    def _common_metadata(self, number: int, rows: _Rows, slots: Tensor) -> CommonAttentionMetadata:
        starts = torch.tensor([0, *itertools.accumulate(rows.queries.tolist())], dtype=torch.int32)
        lengths, count = torch.from_numpy(rows.lengths), len(rows.queries)
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device, non_blocking=True),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(self.device, non_blocking=True),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=count,
            num_actual_tokens=len(rows.entry),
            max_query_len=int(rows.queries.max()),
            max_seq_len=int(rows.lengths.max()),
            block_table_tensor=self.input_batch.block_table[number].get_device_tensor(count),
            slot_mapping=slots,
            is_prefilling=torch.from_numpy(rows.queries == rows.lengths),
        )


class StageCPURunner(StageRunner, CPUModelRunner):
    """Model runner on a CPU."""


class StageCPUWorker(cpu_worker.CPUWorker):
    """Worker on a CPU; vLLM's names the class of its runner in ``init_device``."""

    def init_device(self) -> None:
        cpu_worker.CPUModelRunner = StageCPURunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = CPUModelRunner


class StageGPUWorker(gpu_worker.Worker):
    """Worker on a GPU."""

    def _make_model_runner(self) -> GPUModelRunner:
        return StageRunner(self.vllm_config, self.device)
