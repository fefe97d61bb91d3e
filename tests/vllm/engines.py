"""vLLM's answers and transformers' answers to the same requests, with the logarithms of all probabilities."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from toprl_models import Policy, RandomPolicy, Schedule, StageContext, attach
from toprl_models.integrations.vllm.options import PruningOptions

NEW_TOKENS = 4


@dataclass
class Request:
    """A prompt with a placeholder for each of its pictures."""

    text: str
    images: Sequence[Image.Image] = field(default_factory=list)


class Answer(NamedTuple):
    """Generated tokens, log-probabilities ``[NEW_TOKENS, vocabulary]`` and the tokens of the prompt."""

    tokens: list[int]
    log_probs: Tensor
    prompt_tokens: int


@contextlib.contextmanager
def engine(folder: Path, options: dict[str, Any] | None = None, **settings: Any) -> Iterator[Any]:
    """An engine of vLLM in this process, without a server."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"max_model_len": 512, "max_num_seqs": 64, "enforce_eager": True, **settings}
    llm = LLM(
        model=str(folder),
        dtype="float32",
        max_logprobs=-1,
        limit_mm_per_prompt={"image": 2},
        additional_config={} if options is None else {"toprl": options},
        **settings,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def served(llm: Any, requests: Sequence[Request]) -> list[Answer]:
    """vLLM's greedy answers, all requests at once; an end token ends nothing."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=-1, ignore_eos=True)
    prompts = [
        {"prompt": request.text, "multi_modal_data": {"image": list(request.images)}}
        if request.images
        else {"prompt": request.text}
        for request in requests
    ]
    answers = []
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        steps = output.outputs[0].logprobs
        log_probs = torch.tensor([[step[token].logprob for token in range(len(step))] for step in steps])
        answers.append(Answer(list(output.outputs[0].token_ids), log_probs, len(output.prompt_token_ids)))
    return answers


class Kept(Policy):
    """Keep these of a prompt's visual tokens."""

    def __init__(self, raster: Sequence[int], positions: str) -> None:
        self.raster, self.positions = list(raster), positions

    def score(self, context: StageContext) -> Tensor:
        return torch.isin(context.visual_index, torch.tensor(self.raster)).float()


def by_attach(model: Any, processor: Any, requests: Sequence[Request], options: dict[str, Any] | None) -> list[Answer]:
    """The answers of transformers, one by one; each of several images is pruned as if it were alone."""
    if options is None:
        return [_generated(model, _inputs(processor, request)) for request in requests]
    read = PruningOptions.read(options)
    prepared = read.prepare(model.config)

    def policy() -> Policy:
        if isinstance(prepared, RandomPolicy):
            prepared.generator.manual_seed(0)  # draws anew
        return prepared

    return [
        _pruned(model, processor, request, read, policy)
        if request.images
        else _generated(model, _inputs(processor, request))
        for request in requests
    ]


def _pruned(
    model: Any, processor: Any, request: Request, options: PruningOptions, policy: Callable[[], Policy]
) -> Answer:
    inputs = _inputs(processor, request)
    # VisionZip shares a prompt's tokens among pictures of the same size evenly
    if len(request.images) == 1 or options.method == "visionzip":
        with attach(model, policy(), schedule=options.schedule):
            return _generated(model, inputs)
    raster, start = [], 0
    placeholder = request.text.split()[1]
    for image in request.images:
        alone = _inputs(processor, Request(f"w5 {placeholder} w6", [image]))
        with attach(model, policy(), schedule=options.schedule) as pruner, torch.no_grad():
            model(**alone)
        (trace,) = pruner.trace
        raster += [start + number for number in trace.indices[0].tolist()]
        start += trace.num_visual[0]
    with attach(model, Kept(raster, policy().positions), schedule=Schedule(((0, len(raster)),))):
        return _generated(model, inputs)


def _inputs(processor: Any, request: Request) -> dict[str, Tensor]:
    if not request.images:
        return processor.tokenizer(request.text, return_tensors="pt", return_token_type_ids=False)
    inputs = processor(images=list(request.images), text=request.text, return_tensors="pt")
    if "token_type_ids" in inputs:  # Gemma 3: vLLM's attention for the CPU is causal within an image, too
        inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
    return inputs


@torch.no_grad()
def _generated(model: Any, inputs: dict[str, Tensor]) -> Answer:
    output = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    length = inputs["input_ids"].shape[1]
    return Answer(
        output.sequences[0, length:].tolist(), torch.stack(output.logits, 1)[0].float().log_softmax(-1), length
    )


def furthest(answers: Sequence[Answer], expected: Sequence[Answer]) -> float:
    """The largest distance of log-probabilities; infinite where tokens differ."""
    worst = 0.0
    for ours, theirs in zip(answers, expected, strict=True):
        if ours.tokens != theirs.tokens:
            return float("inf")
        width = min(ours.log_probs.shape[1], theirs.log_probs.shape[1])
        distance = (ours.log_probs[:, :width] - theirs.log_probs[:, :width]).abs()
        worst = max(worst, float(distance.max()))
    return worst
