"""Runs every cell - task, method, budget, seed - over its samples, in one process or on several ranks."""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import distributed

from toprl_models import Policy, Schedule, attach
from toprl_models.families import count_visual, family_of, min_stage_of
from toprl_models.registry import layers_for
from toprl_models.schedule import stage_layers_for
from training.evaluation.config import EvaluateConfig
from training.evaluation.measure import answer_timed
from training.evaluation.methods import Trained, make_method, name_samples, policies_for, row_for
from training.evaluation.records import FREE, FULL, Cell, Store
from training.survey import duration, peak_memory, survey
from training.tasks import Sample, Task, device_of, encode

PROBE = 8  # samples whose visual tokens are counted before anything runs


class Ranks:
    """The processes that torchrun started; a single one without it."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if self.world > 1:
            # ranks wait for the slowest, which may take hours; one that dies is torchrun's to notice
            distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))

    def wait(self) -> None:
        if self.world > 1:
            distributed.barrier()

    def close(self) -> None:
        if self.world > 1:
            distributed.destroy_process_group()


class Runner:
    """All cells of an evaluation.

    Args:
        tasks: by name.
        policies: those of --policy, on the model's device.
        batch_size: samples per forward pass. Batches are cut before ranks share them, so that a sample has the same
            neighbours (and padding) on any number of ranks.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        model: Any,
        processor: Any,
        tasks: Mapping[str, Task],
        policies: Sequence[Trained],
        batch_size: int,
    ) -> None:
        self.config, self.model, self.processor, self.tasks = config, model, processor, tasks
        self.policies, self.batch_size = policies, batch_size
        self.num_layers: int = model.config.get_text_config().num_hidden_layers
        self.layers = self._layers()
        self._warm: set[tuple[str, str]] = set()

    def layers_of(self, method: str) -> tuple[int, ...]:
        """The layers that ``method`` prunes before; () for the unpruned model."""
        info = row_for(method).method
        if info is None:
            return ()
        settled = self.policies or self.config.stages or self.config.keep
        if info.staged and settled:
            return self.layers
        return layers_for(info, self.model, self.layers if self.policies else ())

    def _layers(self) -> tuple[int, ...]:
        """The layers that methods of several stages prune before.

        Raises:
            ValueError: --stages is not what the policy was trained for, or does not fit the model.
        """
        trained = self.policies[0].policy.stage_layers if self.policies else None
        asked = tuple(self.config.stages)
        if trained and asked and trained != asked:
            raise ValueError(f"--stages {asked}: the policy was trained for {trained}; leave --stages out")
        layers = (
            trained
            or asked
            or stage_layers_for(self.num_layers, max(1, min_stage_of(self.model, family_of(self.model))))
        )
        for one in self.policies:
            one.policy.check(self.model, _keep_all(layers))
        return layers

    # -- what there is to run --------------------------------------------------------------------------------------

    def seeds(self, task: str, method: str) -> Sequence[int]:
        """Seeds of a method that draws; numbers of the task's policies for TOP-RL."""
        row = row_for(method)
        if row.draws:
            return self.config.seeds
        return range(len(policies_for(task, self.policies))) if row.needs_policy else (0,)

    def cells(self, task: str) -> list[Cell]:
        """In the table's order; the unpruned run is the first."""
        found = [Cell(task, FULL, FULL, 0)]
        for method in self.config.methods():
            budgets = self.config.budgets() if row_for(method).scheduled else [FREE]
            if method != FULL:
                found += [Cell(task, method, b, seed) for b in budgets for seed in self.seeds(task, method)]
        return found

    def all_cells(self) -> list[Cell]:
        return [cell for task in self.tasks for cell in self.cells(task)]

    def trained(self, cell: Cell) -> Trained | None:
        """The policy that a cell runs or takes its sizes from."""
        row = row_for(cell.method)
        if not row.needs_policy:
            return None
        policies = policies_for(cell.task, self.policies)
        return policies[0] if row.draws else policies[cell.seed]

    def probe(self) -> None:
        """Refuse an impossible budget before hours of unpruned runs.

        Raises:
            ValueError: no schedule for a budget, where the first samples all have the same number of visual tokens.
        """
        for name, task in self.tasks.items():
            samples = [task[i] for i in range(min(PROBE, len(task)))]
            counts = set(count_visual(self.model, encode(self.processor, task, samples, self.model.device)))
            if len(counts) == 1:
                self.schedules(name, float(counts.pop()))

    def plan(self) -> Iterator[str]:
        """Tell what there is to run and about how long it takes, by answering one batch unpruned."""
        seconds = 0.0
        for name, task in self.tasks.items():
            found, cells = survey(self.model, self.processor, task), len(self.cells(name))
            yield f"{name}: {found}; {cells} runs over them"
            average = float(np.mean(found.tokens))
            for (method, budget), schedule in self.schedules(name, average).items():
                counts = "/".join(map(str, schedule.counts(round(average))))
                yield f"  {method}, budget {budget}: {counts} tokens after layers {schedule.layers} of {average:.0f}"
            samples = [task[i] for i in range(min(self.batch_size, len(task)))]
            inputs = encode(self.processor, task, samples, device_of(self.model))
            for _ in range(2):  # the first call warms up
                batch = answer_timed(self.model, self.processor, task, samples, inputs)
            seconds += (batch.prefill_seconds + batch.decode_seconds) * len(task) * cells
        yield f"at most {duration(seconds)} on one process: as if every run took as long as the unpruned one"
        yield f"peak memory with batches of {self.batch_size}: {peak_memory()}"

    def check_methods(self) -> None:
        """Refuse a method that does not fit the model before hours of unpruned runs.

        Raises:
            ValueError: what ``attach`` refuses.
        """
        for name in self.config.methods():
            trained = self.policies[0].policy if self.policies else None
            layers = self.layers_of(name)
            policy = make_method(name, self.model, policy=trained, layers=layers)
            if policy is not None:
                try:
                    attach(self.model, policy, schedule=_keep_all(layers)).detach()
                except ValueError as error:
                    raise ValueError(f"--method {name}: {error}") from error

    def schedules(self, task: str, num_visual: float) -> dict[tuple[str, str], Schedule]:
        """By method and block, given the visual tokens of a sample (their mean where samples differ).

        Raises:
            ValueError: an impossible budget.
        """
        found = {}
        for name in self.config.methods():
            row, layers = row_for(name), self.layers_of(name)
            if row.method is None:
                continue
            if not row.scheduled:
                found[name, FREE] = _keep_all(layers)
                continue
            for budget in self.config.budgets():
                try:
                    found[name, budget] = self.config.schedule(
                        budget, row.method, layers, self.layers, round(num_visual), self.num_layers
                    )
                except ValueError as error:
                    raise ValueError(f"{task}, {name}: {error}") from error
        return found

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self, store: Store, ranks: Ranks, advance: Callable[[str, int, bool], None]) -> None:
        """Answer what is not answered yet; ``advance(what, n, old)`` hears of every n answers.

        The unpruned runs come first, since they count the visual tokens that budgets are solved for.
        """
        for full in (True, False):
            answered: dict[Cell, set[int]] = {cell: set() for cell in self.all_cells()}
            tokens: dict[str, Counter[int]] = {task: Counter() for task in self.tasks}
            for record in store.records():
                cell = Cell.of(record)
                if cell not in answered:
                    raise ValueError(f"{store.folder} holds answers of {cell}, which is not among its settings")
                answered[cell].add(record["index"])
                if cell.budget == FULL:
                    tokens[cell.task][record["num_visual"]] += 1
            ranks.wait()  # all have read the same before the first of them writes
            for task in self.tasks:
                cells = [cell for cell in self.cells(task) if (cell.budget == FULL) == full]
                if ranks.rank == 0:
                    advance(task, sum(len(answered[cell]) for cell in cells), True)
                schedules = {} if full else self.schedules(task, _mean(tokens[task]))
                self._run_task(store, ranks, cells, answered, schedules, advance)
            ranks.wait()

    def _run_task(
        self,
        store: Store,
        ranks: Ranks,
        cells: Sequence[Cell],
        answered: Mapping[Cell, set[int]],
        schedules: Mapping[tuple[str, str], Schedule],
        advance: Callable[[str, int, bool], None],
    ) -> None:
        task = self.tasks[cells[0].task] if cells else None
        if task is None:
            return
        ours = {cell: self._policy(cell) for cell in cells}
        batches = [range(i, min(i + self.batch_size, len(task))) for i in range(0, len(task), self.batch_size)]
        open_batches = [batch for batch in batches if any(set(batch) - answered[cell] for cell in cells)]
        for batch in open_batches[ranks.rank :: ranks.world]:
            samples = {i: task[i] for i in batch if any(i not in answered[cell] for cell in cells)}
            encoded: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}  # the same for most cells
            for cell, policy in ours.items():
                missing = tuple(i for i in batch if i not in answered[cell])
                if not missing:
                    continue
                if missing not in encoded:
                    chosen = [samples[i] for i in missing]
                    encoded = {missing: encode(self.processor, task, chosen, self.model.device)}
                some = {i: samples[i] for i in missing}
                schedule = schedules.get((cell.method, cell.budget))
                store.append(self._answer(cell, policy, schedule, task, some, encoded[missing]))
                advance(f"{cell.task} {cell.method} {cell.budget}", len(missing), False)

    def _policy(self, cell: Cell) -> Policy | None:
        trained = self.trained(cell)
        layers = self.layers_of(cell.method)
        actor = trained.policy if trained else None
        return make_method(cell.method, self.model, seed=cell.seed, policy=actor, layers=layers)

    def _answer(
        self,
        cell: Cell,
        policy: Policy | None,
        schedule: Schedule | None,
        task: Task,
        samples: Mapping[int, Sample],
        inputs: dict[str, torch.Tensor],
    ) -> list[dict[str, Any]]:
        """The records of a batch."""
        batch = list(samples.values())
        name_samples(policy, [sample.key for sample in batch])
        num_visual = count_visual(self.model, inputs)
        kept: list[tuple[int, ...]] = [()] * len(batch)
        attached = nullcontext() if policy is None else attach(self.model, policy, schedule=_given(schedule))
        with attached as pruner:
            warm = (cell.method, cell.budget)
            if warm not in self._warm:  # first calls compile, tune and allocate: not part of what a sample costs
                self._warm.add(warm)
                self.model.generate(**inputs, max_new_tokens=min(2, task.max_new_tokens), do_sample=False)
            answers = answer_timed(self.model, self.processor, task, batch, inputs)
            if pruner is not None:
                trace = pruner.trace  # empty where no prompt has a visual token
                none = [(0,) * len(self.layers_of(cell.method))] * len(batch)
                kept = list(zip(*(stage.counts for stage in trace), strict=True)) or none
                traced = list(trace[0].num_visual) if trace else [0] * len(batch)
                if traced != num_visual:
                    raise RuntimeError(f"{cell}: the pruner saw {traced} visual tokens, the prompts hold {num_visual}")
        return [
            {
                "task": cell.task,
                "method": cell.method,
                "budget": cell.budget,
                "seed": cell.seed,
                "index": index,
                "key": sample.key,
                "question": sample.question,
                "prediction": answers.texts[row],
                "reference": sample.answer if len(sample.references) == 1 else list(sample.references),
                "score": answers.scores[row],
                "kept": list(kept[row]),
                "num_visual": num_visual[row],
                "prefill_seconds": round(answers.prefill_seconds, 7),
                "decode_seconds": round(answers.decode_seconds, 7),
                "kv_bytes": answers.kv_bytes,
            }
            for row, (index, sample) in enumerate(samples.items())
        ]


def _keep_all(layers: Sequence[int]) -> Schedule:
    return Schedule(tuple((layer, 1.0) for layer in layers))


def _given(schedule: Schedule | None) -> Schedule:
    assert schedule is not None
    return schedule


def _mean(counts: Counter[int]) -> float:
    return sum(value * times for value, times in counts.items()) / counts.total()
