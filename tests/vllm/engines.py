"""vLLM's answers and transformers' answers to the same requests, with the logarithms of all probabilities."""

from __future__ import annotations

import contextlib
import gc
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
    """The answers of transformers; each of several images is pruned as if it were alone."""
    if options is None:
        return _all_generated(model, processor, requests)
    read = PruningOptions.read(options)
    policy = read.prepare(model.config)
    # VisionZip shares a prompt's tokens among pictures of the same size evenly
    most = 2 if read.method == "visionzip" else 1
    text = [request for request in requests if not request.images]
    other = [request for request in requests if 1 <= len(request.images) <= most]
    apart = [request for request in requests if len(request.images) > most]
    with attach(model, policy, schedule=read.schedule):
        pruned = _all_generated(model, processor, other, policy)
    answers = [_pruned_apart(model, processor, request, read, policy) for request in apart]
    made = zip([*apart, *text, *other], [*answers, *_all_generated(model, processor, text), *pruned], strict=True)
    found = {id(request): answer for request, answer in made}
    return [found[id(request)] for request in requests]


def by_attach_inside(
    model: Any, processor: Any, requests: Sequence[Request], options: dict[str, Any], new_tokens: int = NEW_TOKENS
) -> list[Answer]:
    """The answers of transformers with the stages of ``options``, one by one."""
    read = PruningOptions.read(options)
    policy = read.prepare(model.config)
    with attach(model, policy, schedule=read.schedule):
        return _all_generated(model, processor, requests, policy, new_tokens)


def forced(model: Any, processor: Any, request: Request, options: dict[str, Any], tokens: Sequence[int]) -> Answer:
    """The log-probabilities of transformers where the answer is known to be ``tokens``."""
    read, inputs = PruningOptions.read(options), _inputs(processor, request)
    length = inputs["input_ids"].shape[1]

    def next_token(_: int, ids: Tensor) -> list[int]:
        return [tokens[len(ids) - length]]

    with attach(model, read.prepare(model.config), schedule=read.schedule):
        return _generated(model, inputs, len(tokens), prefix_allowed_tokens_fn=next_token)


def _pruned_apart(model: Any, processor: Any, request: Request, options: PruningOptions, policy: Policy) -> Answer:
    raster, start = [], 0
    placeholder = request.text.split()[1]
    for image in request.images:
        alone = _inputs(processor, Request(f"w5 {placeholder} w6", [image]))
        _draw_anew(policy)
        with attach(model, policy, schedule=options.schedule) as pruner, torch.no_grad():
            model(**alone)
        (trace,) = pruner.trace
        raster += [start + number for number in trace.indices[0].tolist()]
        start += trace.num_visual[0]
    with attach(model, Kept(raster, policy.positions), schedule=Schedule(((0, len(raster)),))):
        return _generated(model, _inputs(processor, request))


def _draw_anew(policy: Policy | None) -> None:
    if isinstance(policy, RandomPolicy):
        policy.generator.manual_seed(0)


def _all_generated(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    policy: Policy | None = None,
    new_tokens: int = NEW_TOKENS,
) -> list[Answer]:
    """Generate for the requests together whose inputs have equal shapes, which saves time and needs no padding."""
    groups = defaultdict(list)
    for number, request in enumerate(requests):
        inputs = _inputs(processor, request)
        alike = number if isinstance(policy, RandomPolicy) else 0  # draws anew for each
        groups[alike, *((name, each.shape) for name, each in inputs.items())].append((number, inputs))
    found: dict[int, Answer] = {}
    for group in groups.values():
        for start in range(0, len(group), 32):
            some = group[start : start + 32]
            _draw_anew(policy)
            inputs = {name: torch.cat([each[name] for _, each in some]) for name in some[0][1]}
            answers = _all_of(model, inputs, new_tokens)
            found |= {number: answer for (number, _), answer in zip(some, answers, strict=True)}
    return [found[number] for number in range(len(requests))]


def _inputs(processor: Any, request: Request) -> dict[str, Tensor]:
    if not request.images:
        return processor.tokenizer(request.text, return_tensors="pt", return_token_type_ids=False)
    inputs = processor(images=list(request.images), text=request.text, return_tensors="pt")
    if "token_type_ids" in inputs:  # Gemma 3: vLLM's attention for the CPU is causal within an image, too
        inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
    return inputs


def _generated(model: Any, inputs: dict[str, Tensor], new_tokens: int = NEW_TOKENS, **options: Any) -> Answer:
    return _all_of(model, inputs, new_tokens, **options)[0]


@torch.no_grad()
def _all_of(model: Any, inputs: dict[str, Tensor], new_tokens: int, **options: Any) -> list[Answer]:
    output = model.generate(
        **inputs,
        **options,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    length = inputs["input_ids"].shape[1]
    log_probs = torch.stack(output.logits, 1).float().log_softmax(-1)
    tokens = output.sequences[:, length:].tolist()
    return [Answer(its, each, length) for its, each in zip(tokens, log_probs, strict=True)]


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
