"""Stages inside vLLM's decoder: the answers of ``attach``, and pages that are really returned."""

from __future__ import annotations

import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm import folders
from tests.vllm.engines import (
    INSIDE,
    Request,
    by_attach_inside,
    engine,
    forced,
    furthest,
    scheduler_of,
    served,
)
from tests.vllm.test_plugin import (
    TOLERANCE,
    Subject,
    furthest_in_batches,
    requests_of,
    root,
    scene_requests,
    subject,
)
from toprl_models import TopRLPolicy
from toprl_models.integrations.vllm.options import ARCHITECTURES, NOT_INSIDE
from toprl_models.methods.toprl import model_signature

STAGES = [[1, 0.75], [3, 0.4], [4, 3]]
KINDS = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl")
LENGTHS = (3, 7, 1, 5, 8, 2, 6, 4, 9, 3)

__all__ = ["root"]  # the fixture


def options_of(its: Subject, method: str, stages: list[list[Any]] = STAGES) -> dict[str, Any]:
    if "+" in method:  # the first of them before the language model
        stages = [[0, stages[0][1]], *stages[1:]]
    if not method.startswith("toprl"):
        return {"method": method, "stages": stages}
    folder, layers = its.folder / method, [layer for layer, _ in stages]
    torch.manual_seed(4)
    width, text = its.model.config.get_text_config().hidden_size, "text" if method == "toprl_text" else "none"
    policy = TopRLPolicy(width, layers, 16, model_signature(its.model), condition_on=text)
    torch.nn.init.normal_(policy.head.weight)
    policy.save_pretrained(folder)
    return {"policy": str(folder), "stages": stages}


def expected_of(its: Subject, requests: list[Request], options: dict[str, Any], new_tokens: int = 4) -> Any:
    return by_attach_inside(its.model, its.processor, requests, options, new_tokens)


def requests_inside(kind: str, image: str) -> list[Request]:
    """Those of pruning before the model, and a second text and picture; images in the middle and side by side."""
    its = requests_of(kind, image)
    sizes = folders.KINDS[kind].sizes
    last = Request(f"{folders.words(30, 9)} {image} {folders.words(31, 6)}", [folders.picture(7, sizes[-1])])
    return [*its, last, Request(folders.words(32, 30))]


CASES = [(kind, method) for kind in KINDS for method in ("fastv", "pyramiddrop", "toprl")]
CASES += [("llava", method) for method in ("toprl_text", "sparsevlm", "random", "divprune+fastv+pyramiddrop")]
CASES += [("qwen2_5_vl", method) for method in ("toprl_text", "sparsevlm")]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_every_class(kind: str, method: str, root: Path) -> None:
    """One by one, together, and a few at a time, so that some are prefilled while others decode."""
    its = subject(kind, root)
    requests, options = requests_inside(kind, its.image), options_of(its, method)
    lengths = LENGTHS[: len(requests)]
    with engine(its.folder, options, max_num_seqs=3, **INSIDE) as llm:
        few = served(llm, requests * 2, lengths * 2)
        alone = [served(llm, [request], [4])[0] for request in requests]
    expected = expected_of(its, requests, options, max(lengths))
    unpruned = its.expected(requests, None)
    assert furthest(few, expected * 2) < TOLERANCE
    assert furthest(alone, expected) < TOLERANCE
    with_images = [number for number, request in enumerate(requests) if request.images]
    assert all(furthest([alone[number]], [unpruned[number]]) > 10 * TOLERANCE for number in with_images)


BUDGETS = ([[2, 0.5], [3, 16], [4, 4]], [[2, 0.25]])
EMBEDDED = [(method, BUDGETS[0]) for method in ("fastv", "pyramiddrop", "sparsevlm", "toprl", "toprl_text", "random")]
EMBEDDED += [("fastv", BUDGETS[1]), ("toprl", BUDGETS[1])]


@pytest.mark.parametrize(("method", "stages"), EMBEDDED)
def test_embedded_model(method: str, stages: list[list[Any]], root: Path) -> None:
    """Real answers to 256 questions of six kinds."""
    its = subject("tiny", root)
    requests, _ = scene_requests(256)
    options = options_of(its, method, stages)
    # two tokens of one question have scores that differ by 1e-8, and SparseVLM's clusters depend on their order
    ties = int(method == "sparsevlm")
    with engine(its.folder, options, **INSIDE) as llm:
        assert furthest_in_batches(llm, requests, lambda asked: expected_of(its, asked, options), ties) < TOLERANCE


def blocks_in_use(llm: Any, request: Request) -> list[int]:
    """Blocks of each group while a request runs, of its first group to its last layer's."""
    from vllm import SamplingParams

    its = llm.llm_engine
    prompt = {"prompt": request.text, "multi_modal_data": {"image": request.images}}
    its.add_request("0", prompt, SamplingParams(max_tokens=4, ignore_eos=True))
    its.step()
    managers = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
    counts = [sum(map(len, manager.req_to_blocks.values())) for manager in managers]
    while its.has_unfinished_requests():
        its.step()
    assert not any(manager.req_to_blocks for manager in managers)
    return counts


def test_pages_are_returned(root: Path) -> None:
    """Blocks of 32 tokens: 64 visual tokens and some words in the first layers, 16, then 4 in the others."""
    its = subject("tiny", root)
    request = scene_requests(1)[0][0]
    with engine(its.folder, options_of(its, "fastv", [[2, 16], [4, 4]]), block_size=32, **INSIDE) as llm:
        spec = [group.layer_names for group in scheduler_of(llm).kv_cache_config.kv_cache_groups]
        pruned, free = blocks_in_use(llm, request), scheduler_of(llm).kv_cache_manager.block_pool
        assert free.get_num_free_blocks() == free.num_gpu_blocks - 1  # one is vLLM's null block
    with engine(its.folder, None, block_size=32, **INSIDE) as llm:
        unpruned = blocks_in_use(llm, request)
    assert [[name.split(".")[-3] for name in names] for names in spec] == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert unpruned == [3] and pruned == [3, 1, 1]


def test_preemption(root: Path) -> None:
    """So few pages that a request is put back and prefilled again, with the tokens it had generated."""
    its = subject("tiny", root)
    requests, _ = scene_requests(6)
    options = options_of(its, "fastv", [[2, 24], [4, 8]])
    settings = {"block_size": 32, "num_gpu_blocks_override": 17, "max_model_len": 160, **INSIDE}
    with engine(its.folder, options, **settings) as llm:
        scheduler = scheduler_of(llm)
        with unittest.mock.patch.object(scheduler, "_preempt_request", wraps=scheduler._preempt_request) as preempt:
            answers = served(llm, requests, [40] * len(requests))
    assert preempt.call_count
    assert furthest(answers, expected_of(its, requests, options, 40)) < TOLERANCE


def test_several_answers(root: Path) -> None:
    """n > 1: each answer has pages of its own; they are drawn, so transformers is told which tokens came."""
    its = subject("llava", root)
    request, options = requests_inside("llava", its.image)[0], options_of(its, "pyramiddrop")
    with engine(its.folder, options, **INSIDE) as llm:
        answers = served(llm, [request], [6], n=3, temperature=1.0, seed=5)
    assert len({tuple(answer.tokens) for answer in answers}) > 1
    for answer in answers:
        told = forced(its.model, its.processor, request, options, answer.tokens)
        assert furthest([answer], [told]) < TOLERANCE


@pytest.mark.parametrize("method", ["fastv", "toprl"])
def test_tensor_parallel(method: str, root: Path) -> None:
    """Two processes with half of the heads each decide alike: attention is averaged over the heads of both."""
    its = subject("llava", root)
    requests, options = requests_inside("llava", its.image), options_of(its, method)
    lengths = LENGTHS[: len(requests)]
    with engine(its.folder, options, max_num_seqs=3, tensor_parallel_size=2, **INSIDE) as llm:
        answers = served(llm, requests, lengths)
    assert furthest(answers, expected_of(its, requests, options, max(lengths))) < TOLERANCE


def test_images_wait_for_the_encoder(root: Path) -> None:
    """Where the encoder has room for one picture a step, no prompt is begun with the text before its picture."""
    its = subject("tiny", root)
    requests, options = scene_requests(3)[0], options_of(its, "fastv", [[2, 16]])
    with engine(its.folder, options, **INSIDE) as llm:
        scheduler_of(llm).max_num_encoder_input_tokens = 64
        answers = served(llm, requests)
    assert furthest(answers, expected_of(its, requests, options)) < TOLERANCE


MUTANTS = {
    "decode steps forget what was dropped": ("worker.Share", "entries", "_entries"),
    "positions of survivors are renumbered": ("inside.Staging", "_renumber", "_consecutive"),
}


def _entries(share: Any, stage: int) -> tuple[int, int]:
    if share.computed:
        return share.computed, share.computed + share.scheduled
    return 0, share.scheduled - share.dropped[stage]


def _consecutive(staging: Any, step: Any, stage: Any) -> None:
    if step.origin is not None:
        step.current = torch.cat([torch.arange(request.rows) for request in step.requests])


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_sees_slips(mutant: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, wrong = MUTANTS[mutant]
    its = subject("llava", root)
    requests, options = requests_inside("llava", its.image), options_of(its, "fastv")
    monkeypatch.setattr(f"toprl_models.integrations.vllm.{place}.{name}", globals()[wrong])
    with engine(its.folder, options, **INSIDE) as llm:
        answers = served(llm, requests)
    assert furthest(answers, expected_of(its, requests, options)) > 10 * TOLERANCE


ASKED = {"method": "fastv", "stages": [[2, 0.5]]}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "prefix caching": (ASKED, {**INSIDE, "enable_prefix_caching": True}, "need --no-enable-prefix-caching"),
    "chunked prefill": (ASKED, {**INSIDE, "enable_chunked_prefill": True}, "need --no-enable-chunked-prefill"),
    "compilation": (ASKED, {**INSIDE, "enforce_eager": False}, "need --enforce-eager"),
    "pipeline": (ASKED, {**INSIDE, "pipeline_parallel_size": 2}, "need --pipeline-parallel-size 1"),
    "LoRA": (ASKED, {**INSIDE, "enable_lora": True}, "need no --enable-lora"),
    "a layer that is not there": ({"method": "fastv", "stages": [[6, 0.5]]}, INSIDE, "layer 6, but the decoder has"),
    "layer 0": ({"method": "fastv", "stages": [[0, 0.5]]}, INSIDE, "reads the attention of the layer before"),
    "a method of the tower": ({"method": "visionzip", "stages": [[2, 0.5]]}, INSIDE, "hooks modules of transformers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_at_start(case: str, root: Path) -> None:
    options, settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message), engine(subject("llava", root).folder, options, **settings):
        pass


@pytest.mark.parametrize("kind", ["qwen3_vl", "gemma3"])
def test_other_decoders_are_refused(kind: str, root: Path) -> None:
    assert set(NOT_INSIDE) < set(ARCHITECTURES)
    with (
        pytest.raises(ValueError, match=r"toprl: stages in .*: its decoder .*; give keep in place of stages"),
        engine(subject(kind, root).folder, ASKED, **INSIDE),
    ):
        pass


def test_a_prompt_that_ends_in_its_image(root: Path) -> None:
    """Is refused alone; the engine goes on."""
    its = subject("llava", root)
    bad = Request(f"w5 {its.image}", [folders.picture(1, (32, 32))])
    good = Request(f"w5 {its.image} w7", [folders.picture(0, (32, 32))])
    with engine(its.folder, ASKED, **INSIDE) as llm:
        with pytest.raises(ValueError, match="ends in an image"):
            served(llm, [bad])
        answers = served(llm, [good])
    assert furthest(answers, expected_of(its, [good], ASKED)) < TOLERANCE


def test_a_prompt_that_ends_in_its_image_mark(root: Path) -> None:
    """InternVL's </img> after the visual tokens is text, which a policy can read."""
    its = subject("internvl", root)
    requests = [Request(f"w5 {its.image}", [folders.picture(1, size)]) for size in folders.KINDS["internvl"].sizes]
    with engine(its.folder, ASKED, **INSIDE) as llm:
        answers = served(llm, requests)
    assert furthest(answers, expected_of(its, requests, ASKED)) < TOLERANCE


def test_requests_that_are_refused(root: Path) -> None:
    from vllm.sampling_params import BeamSearchParams

    its = subject("llava", root)
    bad, good = (Request(f"w5 {its.image} w7", [folders.picture(seed, (32, 32))]) for seed in (0, 1))
    prompt = {"prompt": bad.text, "multi_modal_data": {"image": bad.images}}
    with engine(its.folder, ASKED, **INSIDE) as llm:
        with pytest.raises(ValueError, match="beam search would prune each beam anew"):
            llm.beam_search([prompt], BeamSearchParams(beam_width=2, max_tokens=2))
        with pytest.raises(ValueError, match="prompt_logprobs: tokens that a stage drops have none"):
            served(llm, [bad], prompt_logprobs=1)
        assert len(served(llm, [good])) == 1
