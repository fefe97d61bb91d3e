"""Train a TOP-RL pruning policy with PPO.

    python training/ppo.py                                        # ocr on the embedded tiny LLaVA, about a minute
    python training/ppo.py --task shape --stage_layers 1 2 3      # another question kind, other stages
    python training/ppo.py --output_dir runs/ocr --resume auto    # go on where a stopped run was
    python training/ppo.py config.yaml                            # flags from a YAML or JSON file

One iteration is: rollout -> reward (Eq. 5) -> advantages (GAE) -> PPO update. The language model is frozen; actor and
critic learn. Writes metrics.jsonl (what each metric means: docs/training.md), TensorBoard events, checkpoint/ and the
final policy folder, which ``TopRLPolicy.from_pretrained`` loads.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toprl_models import Schedule, TopRLPolicy
from toprl_models.policy import model_signature
from training.rewards import alphas, gae, stage_rewards
from training.rollout import rollout
from training.tasks import load_model, make_task
from training.trainer.checkpoint import load_checkpoint, save_checkpoint
from training.trainer.config import PPOConfig
from training.trainer.data import TrainingData, training_data
from training.trainer.log import Log
from training.trainer.objectives import update


def main(config: PPOConfig, data: TrainingData | None = None) -> Path:
    """Train; returns the folder of the final policy.

    Args:
        data: what to train on instead of --task's own samples: measured before, or of a task without a name.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)  # data order and minibatches
    model, processor = load_model(config.model_name_or_path, device, getattr(torch, config.dtype))
    schedule = Schedule(tuple((layer, 1.0) for layer in config.stage_layers))
    policy = TopRLPolicy(
        model.config.get_text_config().hidden_size,
        config.stage_layers,
        actor_size=config.actor_size,
        base_model=model_signature(model),
        metadata={"task": config.task, "model": config.model_name_or_path, "ppo": asdict(config)},
    ).to(device)
    policy.check(model, schedule)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, eps=1e-5)
    start = 0
    if config.resume == "auto" and (state := load_checkpoint(folder / "checkpoint", policy, config)):
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        start = state["iteration"]
        print(f"resumed after iteration {start}")
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))
    log = Log(folder, start)

    if data is None:
        options = {name: value for name in ("dataset_path", "metric") if (value := getattr(config, name))}
        task = make_task(config.task, "train", config.train_size, seed=config.seed, **options)
        data = training_data(model, processor, task, config.rollout_size)
    task, samples, quality = data
    # Q_p / Q is undefined at Q = 0 (the unpruned model is wrong): those samples teach the actor nothing
    usable = quality.nonzero().flatten()
    if not len(usable):
        raise RuntimeError(
            f"--task {config.task}: the unpruned model answers none of {len(samples)} samples; nothing to learn"
        )
    alpha = alphas(len(config.stage_layers), config.eta, config.alpha_schedule)

    columns = (TextColumn("[bold]{task.fields[task_name]}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[status]}")) as progress:
        bar = progress.add_task("ppo", total=config.iterations, completed=start, task_name=config.task, status="")
        for iteration in range(start, config.iterations):
            began = time.perf_counter()
            fraction = iteration / max(1, config.iterations - 1)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * (1 - 0.9 * fraction)
            # tau 1.0 -> 0.05; it shapes the relaxed gradient only, never the policy's probabilities
            tau = config.tau_start * (config.tau_end / config.tau_start) ** fraction

            # 1. rollout: s_{t+1} = TransformerLayers(m_t, s_t), m_t ~ pi(. | s_t)                        (Eq. 3)
            rows = usable[torch.randint(len(usable), (config.rollout_size,), generator=generator)]
            batch = [samples[i] for i in rows.tolist()]
            numbers = iteration * config.rollout_size + torch.arange(config.rollout_size)
            episodes = rollout(
                model,
                processor,
                policy,
                schedule,
                task,
                batch,
                data.inputs(model, processor, rows.tolist()),
                episodes=numbers,
                seed=config.seed,
                tau=tau,
                mode=config.rollout,
            )

            # 2. reward: r_t = Q_p / Q - alpha_t L_t / L                                               (Eqs. 1, 2, 5)
            share = episodes.quality / quality[rows]
            rewards = stage_rewards(share, episodes.retained, alpha, config.reward, config.reward_terms)

            # 3. advantages of the discounted return sum_t gamma^(t-1) r_t                                  (Eq. 4)
            values = torch.stack([step.value for step in episodes.steps], 1).cpu()
            advantages, returns = gae(rewards, values, config.gamma, config.gae_lambda)

            # 4. PPO update of actor and critic
            statistics = update(policy, optimizer, episodes, advantages, returns, config, generator)

            explained = 1 - (returns - values).var() / returns.var().clamp(min=1e-8)
            row = {
                "iteration": iteration,
                "reward": rewards.sum(1).mean().item(),
                "accuracy": episodes.quality.mean().item(),
                "retained": episodes.retained.mean(0).tolist(),
                "usable": len(usable) / len(samples),
                "explained_variance": explained.item(),
                "tau": tau,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": time.perf_counter() - began,
                **statistics,
            }
            log.write(row)
            kept = "/".join(f"{x:.2f}" for x in row["retained"])
            status = f"reward {row['reward']:.3f} kept {kept} acc {row['accuracy']:.3f} kl {row['kl_k3']:.3f}"
            progress.update(bar, advance=1, status=status)
            if (iteration + 1) % config.save_every == 0 or iteration + 1 == config.iterations:
                state = {
                    "iteration": iteration + 1,
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "config": asdict(config),
                }
                save_checkpoint(folder / "checkpoint", policy, state)
    log.writer.close()
    policy.save_pretrained(folder / "policy")
    print(f"{status}\npolicy: {folder / 'policy'}" if start < config.iterations else f"policy: {folder / 'policy'}")
    return folder / "policy"


if __name__ == "__main__":
    parser = HfArgumentParser(PPOConfig, description=__doc__.split("\n")[0])
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        main(parser.parse_yaml_file(sys.argv[1])[0])
    elif len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        main(parser.parse_json_file(sys.argv[1])[0])
    else:
        main(parser.parse_args_into_dataclasses()[0])
