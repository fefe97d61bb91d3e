"""Stages inside the decoder of a vLLM model: each request in prefill is pruned as ``attach`` prunes its prompt.

A flat batch of vLLM has the rows of all its requests one after the other. Before a stage's layer the rows of a prompt
with images become its survivors, by the code that ``attach`` runs; layers after it run on fewer rows, with the slots
and attention metadata that ``worker.py`` made for them. Before sampling rows are put back where they were.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention

from toprl_models.integrations.lmms_eval import skeleton, trained_parts
from toprl_models.integrations.vllm.options import KEY, PruningOptions
from toprl_models.integrations.vllm.pages import StageSpec
from toprl_models.integrations.vllm.worker import Share
from toprl_models.probe import decoder_of, has_plain_positions
from toprl_models.runtime.compact import Compact
from toprl_models.runtime.prompt import Call, Told, begin
from toprl_models.runtime.scores import HeadGroup, Observation
from toprl_models.runtime.stage import Observed, Stage
from toprl_models.runtime.state import ForwardPass

logger = logging.getLogger("vllm.toprl")


class _Stop(Exception):
    """End of a layer's forward pass at its attention."""


@dataclass
class Heads(Observation):
    """Queries ``[1, H, n, D]`` and keys of a prompt at one of vLLM's attention layers."""

    @classmethod
    def of(cls, module: Any, query: Tensor, key: Tensor) -> Heads:
        heads = [each.view(1, len(each), -1, module.head_size).transpose(1, 2) for each in (query, key)]
        return cls(module, heads[0], heads[1], heads[1], None, {})

    def _eager(self, query: Tensor, key: Tensor, value: Tensor, queries: Tensor, visible: Tensor) -> Tensor:
        index = queries[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        attention: Any = self.module
        keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
        weights = query.gather(2, index).float() @ keys.transpose(2, 3) * attention.impl.scale
        return weights.masked_fill(~visible[:, None], torch.finfo(torch.float32).min).softmax(-1)


class Ranks(HeadGroup):
    """vLLM's ranks of tensor parallelism."""

    def __init__(self) -> None:
        ranks = get_tp_group()
        self._group = ranks.device_group if ranks.world_size > 1 else None


@dataclass
class Request:
    """A request in the step that runs; ``forward`` is its state as a prompt of ``attach``, None if none prunes."""

    share: Share
    first: int  # its first row in the whole batch
    rows: int  # in the layers that run now
    forward: ForwardPass | None
    generator: Tensor | None = None  # state of a policy that draws


@dataclass
class Step:
    """A step of vLLM that prunes or goes on after a pruned prompt."""

    requests: list[Request]
    positions: Tensor  # [rows] or [3, rows] of the whole batch
    num_rows: int  # of the whole batch, padding included
    current: Tensor  # positions of the rows that the layers run on now
    origin: Tensor | None = None  # int64, which rows of the whole batch those are; None: all of them
    seen: tuple[Any, Tensor, Tensor] | None = None  # the last watched attention, its queries and keys

    def spans(self) -> list[tuple[int, int]]:
        """List the first and last row of each request, in the layers that run now."""
        ends = [*itertools.accumulate(request.rows for request in self.requests)]
        return list(zip([0, *ends], ends, strict=False))


class Staging:
    """The stages of a vLLM model: hooks in its decoder, and the step that runs.

    Args:
        decoder: vLLM's module that runs the ``layers`` of the language model.
        config: the model's config, with the plug-in's options.
    """

    def __init__(self, decoder: Any, config: Any) -> None:
        options = PruningOptions.stored_in(config)
        self.policy, self.schedule = options.prepare(config), options.schedule
        like = skeleton(config)
        plain, numbers = has_plain_positions(like), range(len(self.schedule))
        of_stage = [self.policy.at_stage(number) for number in numbers]
        self.renumbers = tuple(plain and policy.positions == "renumbered" for policy in of_stage)
        self._mode = Compact(decoder_of(like), self.schedule.layers, self.renumbers)
        heads = Ranks()
        self._stages = [Stage(number, policy, self.schedule, heads) for number, policy in enumerate(of_stage)]
        self._shares: list[Share] | None = None
        self._step: Step | None = None
        self._asking = False
        # a policy that draws does so for each prompt anew: the order of prompts is the scheduler's
        generator = getattr(self.policy, "generator", None)
        self._drawn_from = None if generator is None else generator.get_state()
        self.prompts = 0
        self._ready = False
        self._hook(decoder)

    def _hook(self, decoder: Any) -> None:
        first, stage_at = self.schedule.layers[0], dict(zip(self.schedule.layers, self._stages, strict=True))
        for index, layer in enumerate(decoder.layers):
            attention = attention_of(layer)
            number = sum(at <= index for at in self.schedule.layers)
            if number:
                spec_of = attention.get_kv_cache_spec
                attention.get_kv_cache_spec = functools.partial(_stage_spec, spec_of, number - 1)
            if index == 0:
                layer.register_forward_pre_hook(self._begin)
            if index >= first:
                layer.register_forward_pre_hook(functools.partial(self._before_layer, stage_at.get(index)))
            next_stage, its_stage = stage_at.get(index + 1), stage_at.get(index)
            if (next_stage and next_stage.attention_from == "previous") or (
                its_stage and its_stage.attention_from == "current"
            ):
                attention.register_forward_pre_hook(self._watch)
        decoder.norm.register_forward_hook(self._put_back)

    def begin(self, shares: list[Share] | None) -> None:
        """Note what the next step consists of; None: nothing is pruned."""
        self._shares, self._step = shares, None

    # -- hooks -----------------------------------------------------------------------------------------------------

    def _begin(self, layer: nn.Module, args: tuple) -> None:
        if self._shares is None or self._asking:
            return
        positions, states, _ = args
        if not self._ready:
            for part in trained_parts(self.policy):
                part.to(states.device).eval()
                part.fold(states.dtype, 0)
            self._ready = True
        requests, first = [], 0
        for share in self._shares:
            forward = None
            if share.visual is not None and share.dropped[-1]:
                visual = share.visual.to(states.device)[None]
                call = Call((1, share.scheduled), visual=visual, told=Told(prompt_length=share.prompt))
                forward = begin(call, states[None, first : first + share.scheduled], {})
            requests.append(Request(share, first, share.scheduled, forward, self._drawn_from))
            first += share.scheduled
        self._step = Step(requests, positions, len(states), positions)

    def _before_layer(self, stage: Stage | None, layer: nn.Module, args: tuple) -> tuple | None:
        step = self._step
        if step is None or self._asking:
            return None
        _, states, residual = args
        if stage is not None:
            if any(request.forward for request in step.requests):
                states = states if residual is None else states + residual
                states, residual = self._at_stage(step, stage, layer, states), None
            self._renumber(step, stage)
        return step.current, states, residual

    def _watch(self, attention: nn.Module, args: tuple) -> None:
        if self._step is not None:
            self._step.seen = attention, args[0], args[1]
            if self._asking:
                raise _Stop

    def _put_back(self, norm: nn.Module, args: tuple, output: Any) -> Any:
        step, self._step = self._step, None
        if step is None or step.origin is None:
            return output
        states, rest = output
        whole = states.new_zeros(step.num_rows, states.shape[1])
        return whole.index_copy(0, step.origin, states), rest

    # -- a stage ---------------------------------------------------------------------------------------------------

    def _at_stage(self, step: Step, stage: Stage, layer: nn.Module, states: Tensor) -> Tensor:
        """Gather the survivors of all requests' rows ``[n, d]``."""
        seen = step.seen if stage.attention_from == "previous" else None
        kept, origins = [], []
        for request, (start, end) in zip(step.requests, step.spans(), strict=True):
            rows, forward = states[start:end], request.forward
            if forward is not None:
                observe = functools.partial(self._observe, step, layer, rows, start, end, seen)
                rows = self._prune(stage, request, forward, rows, observe)
                slots = forward.segment.slots
            if forward is None or slots is None:
                slots = torch.arange(len(rows), device=rows.device)[None]
            kept.append(rows)
            origins.append(request.first + slots[0])
            request.rows = len(rows)
        step.origin = torch.cat(origins)
        return torch.cat(kept)

    def _prune(
        self, stage: Stage, request: Request, forward: ForwardPass, rows: Tensor, observe: Callable[[], Observed]
    ) -> Tensor:
        stage.observe = functools.cache(observe)
        if request.generator is not None:
            self.policy.generator.set_state(request.generator)  # type: ignore[attr-defined]
        decision, counts = stage.decide(forward, rows[None])
        if request.generator is not None:
            request.generator = self.policy.generator.get_state()  # type: ignore[attr-defined]
        stage.observe = None
        expected = forward.num_visual[0] - request.share.dropped[stage.number]
        if counts != (expected,):
            raise ValueError(
                f"policy {type(stage.policy).__name__} keeps {counts[0]} tokens where the schedule says {expected}, "
                "but vLLM hands out pages before it decides: use a policy that takes the top-k of its scores"
            )
        (survivors,) = self._mode.at_stage(forward, stage, rows[None], decision, counts, {})
        self._log(request, forward)
        return survivors

    def _observe(
        self, step: Step, layer: nn.Module, rows: Tensor, start: int, end: int, seen: tuple[Any, Tensor, Tensor] | None
    ) -> Observed:
        """Return the attention of the layer before the stage, as it was ``seen``, or ask the layer after it."""
        if seen is None:
            self._asking = True
            try:
                layer(step.current[..., start:end], rows, None)
            except _Stop:
                pass
            finally:
                self._asking = False
            assert step.seen is not None
            return Observed(Heads.of(*step.seen), 0)
        attention, query, key = seen
        return Observed(Heads.of(attention, query[start:end], key[start:end]), 0)

    def _renumber(self, step: Step, stage: Stage) -> None:
        """Make the positions of the rows that the layers from here on run on."""
        step.current = step.positions if step.origin is None else step.positions[..., step.origin]
        if not any(self.renumbers[: stage.number + 1]):
            return
        moved = []
        for request in step.requests:
            if request.forward is None:
                dropped = (0, *request.share.dropped)
                steps = zip(self.renumbers[: stage.number + 1], itertools.pairwise(dropped), strict=False)
                shift = sum(after - before for renumbers, (before, after) in steps if renumbers)
                moved.append(step.positions.new_full((request.rows,), shift))
            else:
                by = request.forward.segment.moved
                moved.append(step.positions.new_zeros(request.rows) if by is None else by[0].to(step.positions))
        padding = step.current.shape[-1] - sum(map(len, moved))
        step.current = step.current - torch.cat([*moved, step.positions.new_zeros(padding)])

    def _log(self, request: Request, forward: ForwardPass) -> None:
        """Log what was kept of a request (debug), and whenever the number of prompts has doubled how many tokens."""
        trace = forward.trace[-1]
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "toprl: request %s keeps %d of %d visual tokens before layer %d: %s",
                request.share.name, trace.counts[0], trace.num_visual[0], trace.layer, trace.indices[0].tolist(),
            )  # fmt: skip
        if trace.stage:
            return
        self.prompts += 1
        if (self.prompts - 1).bit_length() < self.prompts.bit_length():
            kept = [trace.num_visual[0] - dropped for dropped in request.share.dropped]
            logger.info("toprl: %d prompts pruned, the last from %d to %s", self.prompts, trace.num_visual[0], kept)


def attention_of(layer: nn.Module) -> Any:
    """Find the attention of one of vLLM's decoder layers.

    Raises:
        ValueError: there is no single one, or one that is more than a softmax.
    """
    found: list[Any] = [module for module in layer.modules() if isinstance(module, Attention)]
    if len(found) != 1 or getattr(found[0].impl, "logits_soft_cap", None):
        raise ValueError(
            f"{KEY}: {type(layer).__name__} has no single softmax attention, so that it cannot be pruned inside the "
            "decoder; give keep, not stages"
        )
    return found[0]


def _stage_spec(spec_of: Callable[[Any], Any], stage: int, vllm_config: Any) -> StageSpec:
    return StageSpec.of(spec_of(vllm_config), stage)
