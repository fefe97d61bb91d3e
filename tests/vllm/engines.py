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


INSIDE = {"enable_prefix_caching": False, "enable_chunked_prefill": False}  # what stages inside the decoder need


def served(
    llm: Any, requests: Sequence[Request], lengths: Sequence[int] | None = None, **sampling: Any
) -> list[Answer]:
    """vLLM's answers, all requests at once, greedy by default; an end token ends nothing.

    ``lengths`` are numbers of tokens, so that requests end and others begin while some go on. A request with ``n`` has
    as many answers.
    """
    from vllm import SamplingParams

    sampling = {"temperature": 0, "logprobs": -1, "ignore_eos": True, **sampling}
    lengths = [NEW_TOKENS] * len(requests) if lengths is None else lengths
    prompts = [
        {"prompt": request.text, "multi_modal_data": {"image": list(request.images)}}
        if request.images
        else {"prompt": request.text}
        for request in requests
    ]
    params = [SamplingParams(**sampling, max_tokens=length) for length in lengths]
    return [
        answer_of(completion, len(output.prompt_token_ids))
        for output in llm.generate(prompts, params, use_tqdm=False)
        for completion in output.outputs
    ]


def answer_of(completion: Any, prompt_tokens: int) -> Answer:
    """One of vLLM's outputs as an answer."""
    log_probs = [[step[token].logprob for token in range(len(step))] for step in completion.logprobs]
    return Answer(list(completion.token_ids), torch.tensor(log_probs), prompt_tokens)


def scheduler_of(llm: Any) -> Any:
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


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


def by_attach_inside(
    model: Any, processor: Any, requests: Sequence[Request], options: dict[str, Any], new_tokens: int = NEW_TOKENS
) -> list[Answer]:
    """The answers of transformers with the stages of ``options``, one by one."""
    read, answers = PruningOptions.read(options), []
    policy = read.prepare(model.config)
    with attach(model, policy, schedule=read.schedule):
        for request in requests:
            if isinstance(policy, RandomPolicy):
                policy.generator.manual_seed(0)  # draws anew
            answers.append(_generated(model, _inputs(processor, request), new_tokens))
    return answers


def forced(model: Any, processor: Any, request: Request, options: dict[str, Any], tokens: Sequence[int]) -> Answer:
    """The log-probabilities of transformers where the answer is known to be ``tokens``."""
    read, inputs = PruningOptions.read(options), _inputs(processor, request)
    length = inputs["input_ids"].shape[1]

    def next_token(_: int, ids: Tensor) -> list[int]:
        return [tokens[len(ids) - length]]

    with attach(model, read.prepare(model.config), schedule=read.schedule):
        return _generated(model, inputs, len(tokens), prefix_allowed_tokens_fn=next_token)


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
def _generated(model: Any, inputs: dict[str, Tensor], new_tokens: int = NEW_TOKENS, **options: Any) -> Answer:
    output = model.generate(
        **inputs,
        **options,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    length = inputs["input_ids"].shape[1]
    return Answer(
        output.sequences[0, length:].tolist(), torch.stack(output.logits, 1)[0].float().log_softmax(-1), length
    )


def furthest(answers: Sequence[Answer], expected: Sequence[Answer]) -> float:
    """The largest distance of log-probabilities, over the tokens that were asked for; infinite where tokens differ."""
    worst = 0.0
    for ours, theirs in zip(answers, expected, strict=True):
        length = len(ours.tokens)
        if ours.tokens != theirs.tokens[:length]:
            return float("inf")
        width = min(ours.log_probs.shape[1], theirs.log_probs.shape[1])
        distance = (ours.log_probs[:, :width] - theirs.log_probs[:length, :width]).abs()
        worst = max(worst, float(distance.max()))
    return worst
