"""Train a TOP-RL pruning policy with PPO.

    python training/ppo.py                                        # ocr on the embedded tiny LLaVA, about a minute
    python training/ppo.py --task shape --stage_layers 1 2 3      # another question kind, other stages
    python training/ppo.py --output_dir runs/ocr --resume auto    # go on where a stopped run was
    python training/ppo.py --task custom --dataset_path my.jsonl --metric exact_match --dry_run  # what it would take
    python training/ppo.py config.yaml                            # flags from a YAML or JSON file
    torchrun --nproc_per_node 8 training/ppo.py config.yaml       # the same policy, on 8 GPUs

One iteration is: rollout -> reward (Eq. 5) -> advantages (GAE) -> PPO update. The language model is frozen; actor and
critic learn. Writes metrics.jsonl (what each metric means: docs/training.md), validation.jsonl, TensorBoard events,
checkpoints/, best, and policy/: the best policy, which ``TopRLPolicy.from_pretrained`` loads.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toprl_models import Schedule, TopRLPolicy
from toprl_models.methods.toprl import model_signature
from training import cli
from training.fingerprint import code_facts, model_facts, processor_digest
from training.rewards import (
    alphas,
    check_budget,
    gae,
    group_advantages,
    retention_term,
    reward_quality,
    stage_rewards,
    usable_samples,
)
from training.rollout import Rollout, rollout
from training.tasks import check_stages, device_of, load_model
from training.trainer.checkpoint import CheckpointError, Writer, load_checkpoint, publish, start_anew
from training.trainer.config import PPOConfig, local_name
from training.trainer.console import Console
from training.trainer.data import TrainingData, measured, unanswered
from training.trainer.dry_run import dry_run
from training.trainer.episodes import concatenate
from training.trainer.features import FeatureCache
from training.trainer.launch import device_name, sigterm_raises, torchrun_ranks
from training.trainer.log import Log
from training.trainer.objectives import update
from training.trainer.profile import Phases
from training.trainer.ranks import Ranks
from training.trainer.straight_through import StraightThrough
from training.trainer.teacher_forcing import answer_log_prob, pruned_log_prob
from training.trainer.validation import split_off, standing, tasks_of, validate
from training.trainer.watch import Watch, naming_checkpoint, require_finite


class Trainer:
    """One run. ``train`` is the whole of it, ``iterate`` the paper's loop body."""

    def __init__(self, config: PPOConfig, data: TrainingData | None, ranks: Ranks, device: str) -> None:
        self.config, self.ranks, self.folder = config, ranks, Path(config.output_dir)
        torch.manual_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)  # data order and minibatches
        self.model, self.processor = load_model(
            config.model_name_or_path,
            device,
            getattr(torch, config.dtype),
            config.attn_implementation or None,
            config.device_map or None,
            config.quantization or None,
        )
        check_stages("--stage_layers", config.stage_layers, self.model)
        self.device = device_of(self.model)
        self.phases = Phases(self.device)
        self.schedule = Schedule(tuple((layer, 1.0) for layer in config.stage_layers))
        self.alpha = alphas(len(config.stage_layers), config.eta, config.alpha_schedule)
        if config.rollout_size < ranks.size:
            raise ValueError(
                f"--rollout_size {config.rollout_size}: {ranks.size} processes need at least one episode each"
            )
        self.iteration = 0  # iterations done
        self.best: tuple[bool, float] | None = None  # standing of the best validation
        self._read_data(data)
        self.policy = TopRLPolicy(
            self.model.config.get_text_config().hidden_size,
            config.stage_layers,
            actor_size=config.actor_size,
            base_model=model_signature(self.model),
            condition_on=config.condition_on,
            metadata=self._metadata(),
        ).to(self.device)
        self.policy.check(self.model, self.schedule)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=config.learning_rate, eps=1e-5)
        self._open_folder()
        self._measure(measured_before=data is not None)

    def _metadata(self) -> dict[str, Any]:
        """What the policy remembers of its training; nothing of it names a place on this machine."""
        config, facts = self.config, self.data.task.describe()
        data = {"name": local_name(config.dataset_path) or facts["dataset"], "content": self.data.content}
        model = local_name(config.model_name_or_path)
        flags = config.published()
        return {"task": config.task, "metric": facts["metric"], "data": data, "model": model, "ppo": flags}

    def _open_folder(self) -> None:
        config = self.config
        checkpoints = self.folder / "checkpoints"
        if config.resume == "auto" and (state := load_checkpoint(checkpoints, self.policy, config, self.fingerprint)):
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            self.iteration = state["iteration"]
            self.best = None if state["best"] is None else (state["best"][0], state["best"][1])
        if not self.ranks.first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.iteration:
            print(f"resumed after iteration {self.iteration}", flush=True)
        else:
            start_anew(self.folder, config.overwrite)
        (self.folder / "config.json").write_text(json.dumps(asdict(config), indent=1))
        self.log = Log(self.folder, self.iteration, config.report_to, asdict(config))
        self.watch = Watch(config, self.log.rows)
        self.writer = Writer(self.folder, config.keep_checkpoints)

    def _read_data(self, data: TrainingData | None) -> None:
        """Read every sample, before anything is measured or overwritten."""
        config = self.config
        features = FeatureCache(config.feature_cache_mb, min(config.stage_layers))
        self.held_out: TrainingData | None = None
        if data is None:
            train, held_out = tasks_of(config)
            data = unanswered(train, features)
            self.held_out = unanswered(held_out, features) if held_out is not None else None
        self.data = data
        self.fingerprint = {
            "samples": data.content,
            "held_out": self.held_out.content if self.held_out else None,
            "processor": processor_digest(self.processor, data.task, data.samples[0]),
            "model": {name: value for name, value in model_facts(self.model).items() if name in ("config", "weights")},
            "code": code_facts(),
        }

    def _measure(self, measured_before: bool) -> None:
        """Answer all samples once with the unpruned model."""
        config = self.config
        batch_size = config.rollout_batch_size or config.rollout_size
        cache_dir = config.cache_dir or self.folder / "cache"
        for data in (self.data, self.held_out):
            if data is not None and not measured_before:
                data.measure_quality(self.model, self.processor, batch_size, cache_dir, self.ranks)
        if config.eval_every and self.held_out is None:
            self.data, self.held_out = split_off(self.data, config.eval_size)
        data = self.data
        self.unpruned = data.quality
        if config.reward_q == "prob_ratio":
            self.unpruned = measured(
                self.model,
                self.processor,
                data,
                batch_size,
                "answer_log_prob",
                lambda samples, inputs: answer_log_prob(self.model, self.processor, samples, inputs),
                Path(cache_dir),
                self.ranks,
            )
        self.usable = usable_samples(config.reward_q, self.unpruned)
        if not len(self.usable):
            raise RuntimeError(
                f"--task {config.task}: the unpruned model answers none of {len(data.samples)} samples, so that "
                "Q_p / Q is undefined: take --reward_q prob_ratio, or data that the model can do"
            )

    def state(self) -> dict[str, Any]:
        """What, besides the policy, the rest of the run depends on."""
        return {
            "iteration": self.iteration,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "best": self.best,
            "config": asdict(self.config),
            "fingerprint": self.fingerprint,
        }

    def iterate(self) -> dict[str, Any]:
        """One iteration; returns its row of metrics.jsonl."""
        config, ranks = self.config, self.ranks
        began = time.perf_counter()
        fraction = self.iteration / max(1, config.iterations - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - 0.9 * fraction)
        # tau 1.0 -> 0.05; it shapes the relaxed gradient only, never the policy's probabilities
        tau = config.tau_start * (config.tau_end / config.tau_start) ** fraction

        # 1. rollout: s_{t+1} = TransformerLayers(m_t, s_t), m_t ~ pi(. | s_t), each process its share         (Eq. 3)
        repeats = config.group_size if config.baseline == "group" else 1
        drawn = torch.randint(len(self.usable), (config.rollout_size // repeats,), generator=self.generator)
        rows = self.usable[drawn].repeat_interleave(repeats)
        share = ranks.share(config.rollout_size)
        numbers = self.iteration * config.rollout_size + torch.arange(config.rollout_size)
        at_once = config.rollout_batch_size or config.rollout_size
        parts = zip(rows[share].split(at_once), numbers[share].split(at_once), strict=True)
        episodes = concatenate([self.rollout(here.tolist(), mine, tau) for here, mine in parts])

        # 2. reward: r_t = Q_p / Q - alpha_t L_t / L                                                   (Eqs. 1, 2, 5)
        quality, retained, values, rewards = self.rewards(episodes, rows)

        # 3. advantages of the discounted return sum_t gamma^(t-1) r_t                                        (Eq. 4)
        require_finite(rewards=rewards, values=values)
        if config.baseline == "group":
            advantages, returns = group_advantages(rewards, config.gamma, repeats)
        else:
            advantages, returns = gae(rewards, values, config.gamma, config.gae_lambda)

        # 4. PPO update of actor and critic
        task_loss = None if config.objective == "ppo" else self.task_loss(rows[share].tolist(), numbers[share], tau)
        with self.phases("update"):
            statistics = update(
                self.policy, self.optimizer, episodes, advantages, returns, config, self.generator, ranks, task_loss
            )

        explained = 1 - (returns - values).var() / returns.var().clamp(min=1e-8)
        return {
            "iteration": self.iteration,
            "reward": rewards.sum(1).mean().item(),
            "reward_std": rewards.sum(1).std(correction=0).item(),
            "accuracy": quality.mean().item(),
            "retained": retained.mean(0).tolist(),
            "usable": len(self.usable) / len(self.data.samples),
            "advantage_std": advantages.std(correction=0).item(),
            "explained_variance": explained.item(),
            "tau": tau,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **statistics,
            "seconds": time.perf_counter() - began,
            **{f"seconds_{name}": seconds for name, seconds in self.phases.take().items()},
        }

    def rollout(self, rows: list[int], numbers: Tensor, tau: float) -> Rollout:
        """Episodes with these numbers, of the samples with those; layers before the first stage are remembered."""
        config, policy, schedule = self.config, self.policy, self.schedule
        samples = [self.data.samples[row] for row in rows]
        same: dict[str, Any] = {"episodes": numbers, "seed": config.seed, "mode": config.rollout}
        with self.phases("data"):
            inputs = self.data.inputs(self.model, self.processor, rows)
        with self.phases("rollout"), self.data.skipping(self.model, self.processor, rows):
            episodes = rollout(
                self.model, self.processor, policy, schedule, self.data.task, samples, inputs, **same, tau=tau
            )
            if config.reward_q == "prob_ratio":
                episodes.log_prob = pruned_log_prob(
                    self.model, self.processor, policy, schedule, samples, inputs, **same
                )
        return episodes

    def rewards(self, episodes: Rollout, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the episodes of all processes, on the host: Q_p ``[B]``, L_t / L, values and rewards ``[B, T]``.

        Args:
            episodes: this process's.
            rows: numbers of all processes' samples, ``[B]``.
        """
        config, stages, layers = self.config, len(self.config.stage_layers), self.config.stage_layers
        pruned = episodes.quality if episodes.log_prob is None else episodes.log_prob
        known = torch.stack([episodes.quality, pruned.cpu(), episodes.num_visual], 1)
        values = torch.stack([step.value for step in episodes.steps], 1)
        mine = torch.cat([known.to(self.device), episodes.retained.to(self.device), values], 1)
        known, retained, values = self.ranks.gather(mine, len(rows)).cpu().split([3, stages, stages], 1)
        quality, pruned, num_visual = known.unbind(1)
        num_layers = self.model.config.get_text_config().num_hidden_layers
        check_budget(config.budget, int(num_visual.max()), layers, num_layers)
        term = retention_term(retained, num_visual, layers, num_layers, config.budget)
        ratio = reward_quality(config.reward_q, pruned, self.unpruned[rows])
        return quality, retained, values, stage_rewards(ratio, term, self.alpha, config.reward, config.reward_terms)

    def task_loss(self, rows: list[int], numbers: Tensor, tau: float) -> StraightThrough:
        """The differentiable loss of this process's episodes."""
        config = self.config
        return StraightThrough(
            self.model,
            self.processor,
            self.policy,
            self.schedule,
            [self.data.samples[row] for row in rows],
            lambda chosen: self.data.inputs(self.model, self.processor, [rows[i] for i in chosen]),
            episodes=numbers,
            seed=config.seed,
            tau=tau,
            alpha=self.alpha,
            retention_coef=config.retention_coef,
            budget=config.budget,
        )

    def validate(self) -> None:
        """Answer the held-out samples; the best policy so far is kept."""
        assert self.held_out is not None
        row = validate(self.model, self.processor, self.policy, self.schedule, self.held_out, self.config, self.ranks)
        row = {"iteration": self.iteration, **row}
        # an untrained actor keeps all tokens and ranks them at random
        is_best = self.iteration > 0 and (self.best is None or standing(row) > self.best)
        self.best = standing(row) if is_best else self.best
        if self.ranks.first:
            self.log.validation(row)
            self.watch.check_validation(row)
            if is_best:
                self.writer.save_best(self.policy, row)

    def train(self) -> Path:
        """All iterations that are left; returns the folder of the final policy.

        However the run ends, the iterations that it finished are in a checkpoint; only SIGKILL loses those since the
        last one that was due.
        """
        self.phases.take()
        config, console = self.config, Console(self.config, self.iteration, quiet=not self.ranks.first)
        unsaved: tuple[TopRLPolicy, dict[str, Any]] | None = None
        try:
            with console:
                while True:
                    is_last = self.iteration == config.iterations
                    if config.eval_every and (self.iteration % config.eval_every == 0 or is_last):
                        with self.phases("validation"):
                            self.validate()
                    if is_last:
                        break
                    with naming_checkpoint(self.folder / "checkpoints", self.iteration):
                        row = self.iterate()
                    self.iteration += 1
                    if self.ranks.first:
                        unsaved = copy.deepcopy((self.policy, self.state()))
                        with self.phases("log"):
                            self.log.write(row)
                            console.show(row)
                        if self.iteration % config.save_every == 0 or self.iteration == config.iterations:
                            self.writer.save(*unsaved)
                            unsaved = None
                        self.watch.check(row)
        except CheckpointError:
            raise
        except BaseException as error:
            if self.ranks.first:
                if unsaved is not None:
                    self.writer.save(*unsaved)
                self.writer.close()
                self.log.close()
                console.stopped(error, unsaved[1]["iteration"] if unsaved else self.iteration)
            raise
        if self.ranks.first:
            self.writer.close()
            self.log.close()
            print(f"{console.status}\n{publish(self.folder, self.policy)}".lstrip())
        return self.folder / "policy"


def main(config: PPOConfig, data: TrainingData | None = None) -> Path:
    """Train; returns the folder of the final policy.

    Args:
        data: what to train on instead of --task's own samples: measured before, or of a task without a name.
    """
    with sigterm_raises(), torchrun_ranks(config.device, config.ddp_timeout) as (ranks, device):
        return Trainer(config, data, ranks, device).train()


def command(config: PPOConfig) -> None:
    """Do what the flags say."""
    if config.dry_run:
        dry_run(config, lambda small: Trainer(small, None, Ranks(), device_name(small.device)))
    else:
        main(config)


if __name__ == "__main__":
    cli.run(lambda arguments: command(cli.parse(PPOConfig, __doc__, arguments)))
