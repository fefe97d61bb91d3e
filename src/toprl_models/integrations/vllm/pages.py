"""Pages of keys and values for pruning inside the decoder: the layers after a stage hold fewer entries of a request.

How many tokens a stage keeps is known when a request is scheduled, from the schedule and the prompt's images; which
ones is decided in the forward pass. So the layers between two stages are a cache group of their own, whose manager
hands out pages for the tokens that are left. Importing this module registers the group's kind, in each process that
meets it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from toprl_models.integrations.vllm.options import KEY, PruningOptions

FULL_ONLY = ("sliding_window", "attention_chunk_size", "non_causal")  # fields of vLLM's spec that ours has not


@dataclass(frozen=True, kw_only=True)
class StageSpec(AttentionSpec):
    """Cache of a layer after a stage; no FullAttentionSpec, with which vLLM would merge it."""

    stage: int = 0

    @classmethod
    def of(cls, spec: KVCacheSpec, stage: int) -> StageSpec:
        """Make the spec of a layer after ``stage`` from the layer's own.

        Raises:
            ValueError: a layer that does not attend to all earlier tokens.
        """
        if type(spec) is not FullAttentionSpec or any(getattr(spec, name) for name in FULL_ONLY):
            raise ValueError(f"{KEY}: layers with {spec} cannot be pruned inside the decoder; give keep, not stages")
        return replace_as(spec, cls, drop=FULL_ONLY, stage=stage)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of the longest request: one without images."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Tell whether all layers are after the same stage."""
        return all(spec == self for spec in kv_cache_specs.values())


class StageManager(FullAttentionManager):
    """Hands out pages for the tokens that a stage leaves of a request."""

    dropped: Callable[[str], tuple[int, ...]]  # of a request's prompt, by each stage; set by the scheduler

    def _left(self, request_id: str, num_tokens: int) -> int:
        return max(num_tokens - self.dropped(request_id)[self.kv_cache_spec.stage], 0)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        return super().get_num_blocks_to_allocate(request_id, self._left(request_id, num_tokens), *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        counts = (self._left(request_id, count) for count in (num_tokens, num_tokens_main_model))
        return super().allocate_new_blocks(request_id, *counts)


class Counts:
    """How many tokens of a prompt each stage leaves out, known from its images alone."""

    def __init__(self, options: PruningOptions, config: Any) -> None:
        policy, schedule = options.prepare(config), options.schedule
        self.dropped = functools.lru_cache(4096)(
            lambda visual: tuple(visual - kept for kept in policy.counts(schedule, visual))
        )

    def of(self, features: Iterable[Any]) -> tuple[int, ...]:
        """Count for a request with these images."""
        return self.dropped(sum(feature.mm_position.get_num_embeds() for feature in features))


class StageScheduler(Scheduler):
    """Scheduler whose managers know what stages drop, and which begins no prompt that it cannot finish in one step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config.model_config.hf_config
        counts = Counts(PruningOptions.stored_in(config), config)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, StageManager):
                manager.dropped = lambda request_id: counts.of(self.requests[request_id].mm_features)

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, budget: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Wait where the encoder has no room for all images: vLLM would begin with the text before them."""
        planned = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, budget, *args, **kwargs
        )
        if planned[1] == num_new_tokens:
            return planned
        self.encoder_cache_manager.free(request)
        return [], 0, budget, *([] for _ in planned[3:])  # four values in vLLM 0.31, five in 0.32


KVCacheSpecRegistry._ensure_registered()  # it leaves vLLM's own kinds out where another one is there first
KVCacheSpecRegistry.register(StageSpec, StageManager, StageSpec)
