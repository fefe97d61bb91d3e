"""Reproduce the embedded tiny LLaVA checkpoint (src/toprl_models/tiny_llava) from random weights.

    python training/pretrain_tiny.py                                # writes runs/pretrain_tiny
    python training/pretrain_tiny.py --resume auto                  # goes on where a stopped run was
    python training/pretrain_tiny.py --evaluate --eval_size 2000    # accuracy of the shipped checkpoint
    python training/pretrain_tiny.py --steps 20 --vision_steps 5 --last_steps 5  # smoke run

Three phases on freshly composed training scenes: (1) the vision tower and projector learn patch tags (form, colour and
digit on each patch); (2) the whole model learns to answer; (3) it goes on with turned, scaled and moved digits (there
are only 1500 of them, and without that unseen writers are read worse), more questions by position, and the patch's row
and column as further tags: after (2) the decoder tells rows apart by the distance of tokens, but not left from right.
In (2) and (3) the questions of a scene share one sequence
[image, question 1, question 2, ...]: a block mask lets each question see the image and itself only, and its positions
start anew behind the image, so that each is exactly the one-question prompt and the image is encoded once.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toprl_models import tiny
from training import cli
from training.scenes import (
    KINDS,
    NUM_PATCHES,
    PATCH,
    PATCHES_PER_SIDE,
    Scene,
    SceneDataset,
    ask,
    make_scene,
    vocabulary,
)

# Forms (none, 3), colours (none, 8), digits (none, 10): one cross entropy each, from one linear layer per patch.
TAG_SIZES = (4, 9, 11)
PLACE_SIZES = (PATCHES_PER_SIDE, PATCHES_PER_SIDE)  # row and column, last phase
# Questions of each kind per scene; the hard kinds get more.
MIX = {"ocr": 1, "shape": 3, "colour": 3, "exist": 2, "count": 3, "compare": 2}
MIX_LAST = {"ocr": 2, "shape": 4, "colour": 5, "exist": 1, "count": 1, "compare": 1}
QUESTION_LENGTH = 10  # words of the longest question, plus the answer prompt and the answer
IGNORE = -100


@dataclass
class PretrainConfig:
    """Flags of the script."""

    output_dir: str = field(default="runs/pretrain_tiny", metadata={"help": "where checkpoint and log go"})
    steps: int = field(default=1600, metadata={"help": "optimizer steps of the question phase"})
    vision_steps: int = field(default=1500, metadata={"help": "optimizer steps of the patch tag phase"})
    last_steps: int = field(default=700, metadata={"help": "optimizer steps of the last phase"})
    last_learning_rate: float = field(default=8e-4, metadata={"help": "its peak learning rate"})
    batch_size: int = field(default=32, metadata={"help": "scenes per step"})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "peak learning rate of decoder and projector"})
    vision_lr_scale: float = field(default=0.3, metadata={"help": "the vision tower's share of it in the second phase"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay of matrices"})
    tag_weight: float = field(default=0.2, metadata={"help": "weight of the patch tag loss in the second phase"})
    eval_every: int = field(default=250, metadata={"help": "steps between checkpoints and accuracies"})
    eval_size: int = field(default=300, metadata={"help": "test samples per question kind"})
    bf16: bool = field(default=True, metadata={"help": "bfloat16 autocast"})
    num_threads: int = field(default=0, metadata={"help": "torch threads, 0 for torch's own choice"})
    seed: int = field(default=0, metadata={"help": "seed of weights and scenes"})
    evaluate: bool = field(default=False, metadata={"help": "only print the shipped checkpoint's test accuracies"})
    resume: str = field(
        default="never", metadata={"help": '"auto" continues from output_dir\'s state', "choices": ["never", "auto"]}
    )


def jitter_digit(scene: Scene, rng: np.random.Generator) -> None:
    """Turn (15 degrees), scale (15 %) and move (1.5 pixels) the digit of ``scene`` in place, each at random."""
    row, column = divmod(scene.digit_patch, PATCHES_PER_SIDE)
    patch = scene.pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    background = patch.reshape(-1, 3).max(0).astype(np.float32)  # ink only darkens
    ink = Image.fromarray(1 - patch[..., 0] / background[0])
    angle, scale = np.deg2rad(rng.uniform(-15, 15)), 1 / rng.uniform(0.85, 1.15)
    cos, sin, middle = scale * np.cos(angle), scale * np.sin(angle), PATCH / 2
    dx, dy = rng.uniform(-1.5, 1.5, 2) + middle
    inverse = (cos, sin, middle - cos * dx - sin * dy, -sin, cos, middle + sin * dx - cos * dy)
    turned = ink.transform((PATCH, PATCH), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    patch[:] = (background * (1 - np.asarray(turned)[..., None])).astype(np.uint8)


def patch_tags(scenes: list[Scene]) -> Tensor:
    """int64 [B, 64, 3]: form, colour and digit on each patch, 0 for none."""
    tags = np.zeros((len(scenes), NUM_PATCHES, 3), np.int64)
    for row, scene in enumerate(scenes):
        covered = scene.patch_cells >= 0
        cells = scene.patch_cells[covered]
        tags[row, covered, 0] = np.asarray(scene.shapes)[cells] + 1
        tags[row, covered, 1] = np.asarray(scene.colours)[cells] + 1
        tags[row, scene.digit_patch, 2] = scene.digit + 1
    return torch.from_numpy(tags)


def pixel_values(scenes: list[Scene]) -> Tensor:
    """float32 [B, 3, 128, 128] as the processor makes them: (x / 255 - 0.5) / 0.5."""
    pixels = torch.from_numpy(np.stack([s.pixels for s in scenes]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


class Trainer:
    """Model, optimizers and the two losses; state_dict() holds all that a resumed run needs."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.processor = tiny.build_processor(vocabulary())
        self.vocab = self.processor.tokenizer.get_vocab()
        self.model = tiny.build_model(len(self.vocab), config.seed).train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 1)
            self.tag_head = nn.Linear(tiny.HIDDEN_SIZE, sum(TAG_SIZES))
            self.place_head = nn.Linear(tiny.HIDDEN_SIZE, sum(PLACE_SIZES))
        self.step = 0
        self.optimizer = self._make_optimizer()
        length = QUESTION_LENGTH
        num_questions = sum(MIX.values())  # as many as in MIX_LAST
        prefix = 1 + NUM_PATCHES
        block = torch.block_diag(*[torch.ones(length, length, dtype=torch.bool).tril()] * num_questions)
        mask = torch.ones(prefix + len(block), prefix + len(block), dtype=torch.bool).tril()
        mask[prefix:, prefix:] = block
        self.mask = mask[None, None]
        tail = prefix + torch.arange(length).repeat(num_questions)
        self.position_ids = torch.cat([torch.arange(prefix), tail])[None]

    def _make_optimizer(self) -> torch.optim.AdamW:
        groups: dict[tuple[bool, bool], list[Tensor]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            groups["vision_tower" in name, parameter.ndim >= 2].append(parameter)
        groups[False, True].append(self.tag_head.weight)
        groups[False, False].append(self.tag_head.bias)
        rows: list[dict[str, Any]] = [
            {"params": p, "vision": vision, "weight_decay": self.config.weight_decay if matrix else 0.0}
            for (vision, matrix), p in groups.items()
        ]
        rows.append({"params": list(self.place_head.parameters()), "vision": False, "weight_decay": 0.0})
        return torch.optim.AdamW(
            rows,
            lr=self.config.learning_rate,
            betas=(0.9, 0.98),
        )

    def _set_learning_rate(self) -> None:
        config, done, peak = self.config, self.step, self.config.learning_rate
        in_vision_phase = done < config.vision_steps
        length = config.vision_steps
        if not in_vision_phase:
            done, length = done - config.vision_steps, config.steps
            if done >= config.steps:
                done, length, peak = done - config.steps, config.last_steps, config.last_learning_rate
        warmup = min(100, length // 5 + 1)
        scale = min(1.0, (done + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done / length)))
        for group in self.optimizer.param_groups:
            slower = group["vision"] and config.vision_steps <= self.step < config.vision_steps + config.steps
            group["lr"] = peak * scale * (config.vision_lr_scale if slower else 1.0)

    def _tag_loss(self, visual: Tensor, scenes: list[Scene]) -> Tensor:
        logits = self.tag_head(visual).split(TAG_SIZES, -1)
        tags = patch_tags(scenes)
        losses = []
        for i, x in enumerate(logits):
            weight = torch.ones(TAG_SIZES[i])
            weight[0] = 0.2  # most patches are background
            losses.append(F.cross_entropy(x.flatten(0, 1).float(), tags[..., i].flatten(), weight=weight))
        return torch.stack(losses).sum()

    def _place_loss(self, visual: Tensor) -> Tensor:
        """Row and column of every patch."""
        row, column = self.place_head(visual).float().split(PLACE_SIZES, -1)
        patches = torch.arange(NUM_PATCHES).repeat(len(visual))
        return F.cross_entropy(row.flatten(0, 1), patches // PATCHES_PER_SIDE) + F.cross_entropy(
            column.flatten(0, 1), patches % PATCHES_PER_SIDE
        )

    def _answer_loss(self, visual: Tensor, questions: list[list[tuple[str, str]]]) -> Tensor:
        """Cross entropy of the answer word and of the end token behind it."""
        vocab = self.vocab
        ids = np.full((len(questions), len(questions[0]), QUESTION_LENGTH), vocab[tiny.PAD])
        labels = np.full_like(ids, IGNORE)
        for row, asked in enumerate(questions):
            for column, (question, answer) in enumerate(asked):
                words = [*question.split(), tiny.ANSWER, answer]
                ids[row, column, : len(words)] = [vocab[w] for w in words]
                labels[row, column, len(words) - 2] = vocab[answer]
                labels[row, column, len(words) - 1] = vocab[tiny.EOS]
        decoder = self.model.model.language_model
        embed = decoder.embed_tokens
        start = embed(torch.full((len(questions), 1), vocab[tiny.BOS]))
        text = embed(torch.from_numpy(ids).flatten(1))
        embeddings = torch.cat([start, visual, text], 1)
        bias = torch.zeros_like(self.mask, dtype=embeddings.dtype).masked_fill_(~self.mask, -torch.inf)
        hidden = decoder(
            inputs_embeds=embeddings,
            attention_mask=bias.expand(len(questions), -1, -1, -1),
            position_ids=self.position_ids.expand(len(questions), -1),
            use_cache=False,
        ).last_hidden_state[:, 1 + NUM_PATCHES :]
        target = torch.from_numpy(labels).flatten()
        chosen = target != IGNORE
        return F.cross_entropy(self.model.lm_head(hidden.flatten(0, 1)[chosen]).float(), target[chosen])

    def train_step(self) -> dict[str, float]:
        """One optimizer step; scenes and questions depend on (seed, step) alone."""
        config = self.config
        rng = np.random.default_rng([config.seed, 17, self.step])
        scenes = [make_scene(rng, "train") for _ in range(config.batch_size)]
        last_phase = self.step >= config.vision_steps + config.steps
        if last_phase:
            for scene in scenes:
                jitter_digit(scene, rng)
        self._set_learning_rate()
        losses = {}
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            features = self.model.model.get_image_features(pixel_values(scenes)).pooler_output
            visual = torch.stack(list(features))
            losses["tags"] = self._tag_loss(visual, scenes)
            if self.step < config.vision_steps:
                loss = losses["tags"]
            else:
                mix = MIX_LAST if last_phase else MIX
                questions = [[ask(rng, s, kind)[1:] for kind, n in mix.items() for _ in range(n)] for s in scenes]
                losses["answer"] = self._answer_loss(visual, questions)
                loss = losses["answer"] + config.tag_weight * losses["tags"]
                if last_phase:
                    losses["place"] = self._place_loss(visual)
                    loss = loss + config.tag_weight * losses["place"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.step += 1
        return {k: v.item() for k, v in losses.items()}

    @torch.no_grad()
    def accuracy(self, split: str = "test") -> dict[str, float]:
        """Exact-match accuracy of each question kind on scenes of ``split``."""
        self.model.eval()
        result = {}
        for kind in KINDS:
            dataset = SceneDataset(kind, split, self.config.eval_size, seed=1)
            right = 0
            for first in range(0, len(dataset), 100):
                samples = [dataset[i] for i in range(first, min(first + 100, len(dataset)))]
                text = self.processor.tokenizer(
                    [tiny.prompt(s.question).replace(tiny.IMAGE, tiny.IMAGE * NUM_PATCHES) for s in samples],
                    padding=True,
                    return_tensors="pt",
                )
                logits = self.model(
                    input_ids=text["input_ids"],
                    attention_mask=text["attention_mask"],
                    pixel_values=pixel_values([s.scene for s in samples]),
                    logits_to_keep=1,
                ).logits[:, -1]
                answers = torch.tensor([self.vocab[s.answer] for s in samples])
                right += int((logits.argmax(-1) == answers).sum())
            result[kind] = right / len(dataset)
        self.model.train()
        return result

    def save(self, folder: Path) -> None:
        """Checkpoint in float16 beside the state for resuming, each written aside and renamed."""
        half = tiny.build_model(len(self.vocab)).half()
        half.load_state_dict(self.model.state_dict())
        half.save_pretrained(folder / "checkpoint")
        self.processor.save_pretrained(folder / "checkpoint")
        state = {
            "model": self.model.state_dict(),
            "tag_head": self.tag_head.state_dict(),
            "place_head": self.place_head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        torch.save(state, folder / "state.pt.tmp")
        os.replace(folder / "state.pt.tmp", folder / "state.pt")

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.tag_head.load_state_dict(state["tag_head"])
        self.place_head.load_state_dict(state["place_head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def main(config: PretrainConfig) -> None:
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if config.evaluate:
        trainer = Trainer(config)
        trainer.model = tiny.load()[0]
        print(f"shipped checkpoint, {config.eval_size} test samples per kind: {trainer.accuracy()}")
        return
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config)
    if config.resume == "auto" and (folder / "state.pt").is_file():
        trainer.load(folder / "state.pt")
        print(f"resumed at step {trainer.step}", flush=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))
    total = config.vision_steps + config.steps + config.last_steps
    start, first = time.perf_counter(), trainer.step
    sums: dict[str, float] = defaultdict(float)
    while trainer.step < total:
        losses = trainer.train_step()
        for name, value in losses.items():
            sums[name] += value
        if trainer.step % 50 == 0:
            seconds = (time.perf_counter() - start) / (trainer.step - first)
            means = " ".join(f"{k} {v / 50:.3f}" for k, v in sums.items())
            print(f"step {trainer.step}/{total} {means} {seconds:.2f} s/step", flush=True)
            sums.clear()
        if trainer.step % config.eval_every == 0 or trainer.step == total:
            row = {"step": trainer.step, "minutes": round((time.perf_counter() - start) / 60, 1)}
            if trainer.step > config.vision_steps:
                row |= trainer.accuracy()
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
            trainer.save(folder)
    print(f"checkpoint: {folder / 'checkpoint'}")


if __name__ == "__main__":
    cli.run(lambda arguments: main(cli.parse(PretrainConfig, __doc__, arguments)))
