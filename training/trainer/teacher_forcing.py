"""The reference answer put behind the prompt: its log-probability under the model as it is, attached or not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from toprl_models import Pruner, Schedule, TopRLPolicy, attach
from training.rollout import SamplingPolicy
from training.tasks import Sample


def reference_tokens(processor: Any, samples: Sequence[Sample]) -> list[list[int]]:
    """Token ids of each ``Sample.answer`` and the end token behind it.

    Raises:
        ValueError: an empty answer, or a tokenizer without an end token.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no end token; set processor.tokenizer.eos_token")
    rows = []
    for sample in samples:
        ids = tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(
                f"{sample.key}: the answer {sample.answer!r} has no tokens to learn from; use --objective ppo with "
                "--reward_q ratio or metric"
            )
        rows.append([*ids, tokenizer.eos_token_id])
    return rows


def answer_log_prob(
    model: Any, processor: Any, samples: Sequence[Sample], inputs: dict[str, Any], pruner: Pruner | None = None
) -> Tensor:
    """Compute the mean log-probability of each reference answer's tokens, end token included; differentiable.

    The answer follows the prompt in one forward pass. The pruner is told where the prompt ends, so that no policy sees
    the answer: the states it decides on are those of generation.

    Args:
        inputs: of the model for ``samples``, left-padded (``encode``).
        pruner: of the model, where it is attached.

    Returns:
        float32 ``[B]`` on the model's device; its exponential is the geometric mean of the probabilities.

    Raises:
        ValueError: an empty answer, or a tokenizer without an end token.
    """
    answers, prompt = reference_tokens(processor, samples), inputs["input_ids"]
    longest = max(map(len, answers))
    # shorter answers go on with their last token: what comes behind an answer changes nothing before it
    ids = torch.tensor([row + row[-1:] * (longest - len(row)) for row in answers], device=prompt.device)
    counted = torch.tensor([[i < len(row) for i in range(longest)] for row in answers], device=prompt.device)
    extended = inputs | {"input_ids": torch.cat([prompt, ids], 1)}
    for name, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in inputs:
            extended[name] = torch.cat([inputs[name], torch.full_like(ids, fill, dtype=inputs[name].dtype)], 1)
    with nullcontext() if pruner is None else pruner.prompt_length(prompt.shape[1]):
        logits = model(**extended, use_cache=False, logits_to_keep=longest + 1).logits
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_prob = logits[:, :-1].log_softmax(-1, dtype=dtype).gather(2, ids[..., None])[..., 0]
    return (log_prob * counted).sum(1) / counted.sum(1)


@torch.no_grad()
def pruned_log_prob(
    model: Any,
    processor: Any,
    policy: TopRLPolicy,
    schedule: Schedule,
    samples: Sequence[Sample],
    inputs: dict[str, Any],
    *,
    episodes: Tensor,
    seed: int,
    mode: str,
) -> Tensor:
    """``answer_log_prob`` under the masks that a rollout with the same arguments samples, float32 ``[B]``."""
    sampling = SamplingPolicy(policy, seed, episodes, tau=1.0)  # it shapes gradients alone
    with attach(model, sampling, schedule=schedule, mode=mode) as pruner:  # type: ignore[arg-type]
        return answer_log_prob(model, processor, samples, inputs, pruner)
