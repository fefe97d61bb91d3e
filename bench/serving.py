"""Serving with vLLM: requests per second, time to first token and pages in use, unpruned and pruned, random weights.

    python bench/run.py --suite serving           # with the Python of make test-vllm, or of a machine with vLLM

Each provider is an engine in a process of its own, one after the other beside an unpruned one; the two take turns, so
that what else the machine does hits both alike, and ratios mean more than times. Where vLLM is not installed one row
says so. Prompts are an image of the case's visual tokens and some text, answers ``NEW_TOKENS`` tokens: nearly all the
work is prefill. Pictures are new in every round, so that processor, vision tower and the choice of tokens are part of
all times.

Columns that need a word:
    where: "before" the language model, one stage at layer 0, or "inside" its decoder.
    percent: visual tokens per layer, mean over the layers, out of all; the schedule's stages are chosen for it.
    requests_per_second: of ``BATCH`` requests that come at once, median over the rounds; p20 and p80 beside it.
    ttft_ms: from a request that comes alone to its first token, median.
    kv_mib: most memory of keys and values in use at once by the BATCH requests, in pages handed out.
    macs_ratio: decoder multiply-adds of an unpruned prefill over those of the method's, as in the prefill suite.
    speedup, ttft_speedup, kv_ratio: over the unpruned engine of the same rounds.
    efficiency: speedup over macs_ratio, what pruning brings of what it could.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from bench.common import Report, Row, dtype_name, in_turn, quantiles
from bench.prefill import (
    FASTV_STAGE,
    FIRST_WORD_ID,
    IMAGE_ID,
    PATCH_SIZE,
    Case,
    build_actor,
    build_model,
    cases,
    decoder_macs,
)
from toprl_models.schedule import Schedule

BATCH, NEW_TOKENS = 4, 4
TOY = Case("toy", 64, 96, 8, 2, 1, 64, 32, text_tokens=9, vocab_size=100, actor_size=8, dtype=torch.float32)
# as the tests of the plug-in have it; see there
SITE = Path(__file__).parents[1] / "tests/vllm/site"


class Sample(NamedTuple):
    """A round of an engine: seconds for the batch, seconds to a lone request's first token, bytes of its cache."""

    seconds: float
    first: float
    memory: float


@dataclass(frozen=True)
class Provider:
    """A way to serve a case; ``method`` None is unpruned."""

    method: str | None
    percent: int
    where: str = ""

    @property
    def name(self) -> str:
        return f"{self.method} {self.percent} %" if self.method else "unpruned"

    def schedule(self, case: Case) -> Schedule | None:
        """The stages whose average is ``percent`` of the visual tokens."""
        if self.method is None:
            return None
        if self.where == "before":
            return Schedule(((0, self.percent / 100),))
        layers = (FASTV_STAGE,) if self.method == "fastv" else case.stage_layers
        return replace(case, average_tokens=case.visual_tokens * self.percent / 100).schedule(layers)

    def options(self, case: Case, folder: Path) -> dict[str, Any] | None:
        """What ``--additional-config`` says."""
        schedule = self.schedule(case)
        if schedule is None:
            return None
        options: dict[str, Any] = {"method": self.method, "stages": [list(stage) for stage in schedule.stages]}
        if self.where == "before":
            return {"method": self.method, "keep": schedule.stages[0][1]}
        if self.method == "toprl":
            options["policy"] = str(folder / "policy")
        return options


UNPRUNED = Provider(None, 100)
QUICK = (Provider("divprune", 25, "before"), Provider("toprl", 25, "inside"))
FULL = (Provider("toprl", 50, "inside"), *QUICK, Provider("fastv", 25, "inside"))


def run(size: str, device: torch.device, report: Report) -> None:
    """One row per (case, provider)."""
    if importlib.util.find_spec("vllm") is None:
        report.add([{"suite": "serving", "note": "vLLM is not installed here: run with the Python of make test-vllm"}])
        return
    torch.manual_seed(0)
    rounds = {"tiny": 1, "quick": 3, "full": 4}[size]
    for case in [TOY] if size == "tiny" else cases(size, device):
        with tempfile.TemporaryDirectory() as folder:
            save(case, Path(folder))
            for row in time_case(case, Path(folder), QUICK if size != "full" else FULL, rounds):
                report.add([row])


def time_case(case: Case, folder: Path, providers: tuple[Provider, ...], rounds: int) -> Iterator[Row]:
    """Run each provider in turn with an unpruned engine; its row, and in the end that of all unpruned rounds."""
    all_plain: list[Sample] = []
    with serving(case, folder, UNPRUNED) as unpruned:
        for provider in providers:
            with serving(case, folder, provider) as engine:
                calls = {"unpruned": partial(ask, unpruned), "pruned": partial(ask, engine)}
                samples = in_turn(calls, min_rounds=rounds, warm_up=1)
            yield row_of(case, provider, samples["pruned"], samples["unpruned"])
            all_plain += samples["unpruned"]
    yield row_of(case, UNPRUNED, all_plain, all_plain)


def row_of(case: Case, provider: Provider, samples: list[Sample], unpruned: list[Sample]) -> Row:
    """The row of a provider, from its rounds and those of the unpruned engine beside it."""
    schedule = provider.schedule(case)
    stages = zip(schedule.layers, schedule.counts(case.visual_tokens), strict=True) if schedule else ()
    rates, first, memory = medians(samples)
    plain_rates, plain_first, plain_memory = medians(unpruned)
    row: Row = {
        "suite": "serving", "case": case.name, "method": provider.method or "unpruned", "where": provider.where,
        "percent": provider.percent, "dtype": dtype_name(case.dtype), "batch": BATCH, "new_tokens": NEW_TOKENS,
        "visual_tokens": case.visual_tokens, "text_tokens": case.text_tokens, "layers": case.num_layers,
        "stages": " ".join(f"{layer}:{count}" for layer, count in stages),
        "requests_per_second_p20": rates[0], "requests_per_second": rates[1], "requests_per_second_p80": rates[2],
        "ttft_ms": first * 1e3, "kv_mib": memory / 2**20, "rounds": len(samples),
        "speedup": rates[1] / plain_rates[1], "ttft_speedup": plain_first / first, "kv_ratio": memory / plain_memory,
        "macs_ratio": decoder_macs(case, None) / decoder_macs(case, schedule),
    }  # fmt: skip
    return {
        **row,
        "efficiency": row["speedup"] / row["macs_ratio"],
        "ttft_efficiency": row["ttft_speedup"] / row["macs_ratio"],
    }


def medians(samples: list[Sample]) -> tuple[tuple[float, float, float], float, float]:
    """Quantiles of requests per second, median seconds to a first token, most bytes of keys and values."""
    rates = quantiles([BATCH / sample.seconds for sample in samples])
    return rates, quantiles([sample.first for sample in samples])[1], max(sample.memory for sample in samples)


# -- the model in a folder -----------------------------------------------------------------------------------------


def save(case: Case, folder: Path) -> None:
    """Store model, processor and a policy of random weights, as vLLM takes them."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPImageProcessor, LlavaProcessor

    model = build_model(case, torch.device("cpu"))
    side = model.config.vision_config.image_size
    model.save_pretrained(folder)
    size = {"height": side, "width": side}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size),
        tokenizer(case.vocab_size),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="x",
    ).save_pretrained(folder)
    policy = build_actor(case, list(case.stage_layers), torch.device("cpu"))
    policy.save_pretrained(folder / "policy")
    path, tower = folder / "model.safetensors", "vision_tower."
    weights = load_file(path)
    if any(f"{tower}encoder." in name for name in weights):  # vLLM names them as older transformers did
        weights = {name.replace(tower, f"{tower}vision_model."): value for name, value in weights.items()}
        save_file(weights, path, metadata={"format": "pt"})


def tokenizer(vocab_size: int) -> Any:
    """A word-level tokenizer whose words are w4, w5, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<image>": IMAGE_ID, "<s>": 2, "</s>": 3}
    vocab |= {f"w{number}": number for number in range(FIRST_WORD_ID, vocab_size)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        extra_special_tokens={"image_token": "<image>"},
    )


# -- an engine in a process of its own -----------------------------------------------------------------------------


@contextlib.contextmanager
def serving(case: Case, folder: Path, provider: Provider) -> Iterator[Any]:
    """Start the engine of ``provider``; yield the connection to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    before = os.environ.copy()
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SITE), before.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    process = context.Process(target=serve, args=(theirs, case, folder, provider), daemon=True)
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ |= before
    theirs.close()
    try:
        ours.recv()  # EOFError where the engine did not start: its error is on the terminal
        yield ours
    finally:
        with contextlib.suppress(OSError):
            ours.send(False)
        process.join(60)


def ask(connection: Any) -> Sample:
    """Let an engine serve."""
    connection.send(True)
    return connection.recv()


def serve(connection: Any, case: Case, folder: Path, provider: Provider) -> None:
    """Serve whenever told to."""
    from vllm import LLM, SamplingParams

    length = case.visual_tokens + case.text_tokens + NEW_TOKENS + 4
    options = provider.options(case, folder)
    llm = LLM(
        model=str(folder), dtype=dtype_name(case.dtype), enforce_eager=True, max_model_len=length, max_num_seqs=BATCH,
        max_num_batched_tokens=max(4 * length, 2048), limit_mm_per_prompt={"image": 1}, mm_processor_cache_gb=0,
        enable_prefix_caching=False, enable_chunked_prefill=False, disable_log_stats=True, block_size=32,
        kv_cache_memory_bytes=cache_limit(case, length),
        additional_config={} if options is None else {"toprl": options},
    )  # fmt: skip
    engine, sampling = llm.llm_engine, SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    draw, names = np.random.default_rng(0), itertools.count()
    side = case_side(case)
    words = " ".join(f"w{FIRST_WORD_ID + number}" for number in range(case.text_tokens // 2))
    text = f"{words} <image> {words}"

    def prompts(count: int) -> list[dict[str, Any]]:
        pixels = draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        return [{"prompt": text, "multi_modal_data": {"image": Image.fromarray(each)}} for each in pixels]

    def finish(requests: list[dict[str, Any]]) -> tuple[float, float, float]:
        gc.collect()
        start, first, most = time.perf_counter(), 0.0, 0.0
        for request in requests:
            engine.add_request(str(next(names)), request, sampling)
        while engine.has_unfinished_requests():
            produced = engine.step()
            if produced and not first:
                first = time.perf_counter() - start
            most = max(most, cache_bytes(engine))
        return time.perf_counter() - start, first, most

    connection.send(True)
    while connection.recv():
        seconds, _, memory = finish(prompts(BATCH))
        _, first, _ = finish(prompts(1))
        connection.send(Sample(seconds, first, memory))


def cache_limit(case: Case, length: int) -> int:
    """Bytes of keys and values for BATCH requests, and some to spare for blocks that are not full."""
    width = case.hidden_size // case.num_heads * case.num_kv_heads
    return 2 * case.num_layers * width * case.dtype.itemsize * BATCH * (length + 128)


def case_side(case: Case) -> int:
    """Height and width of the picture that has the case's visual tokens."""
    return round((case.visual_tokens // case.num_images) ** 0.5) * PATCH_SIZE


def cache_bytes(engine: Any) -> float:
    """Bytes of the pages that are handed out now; requests that finished have given theirs back."""
    manager = engine.engine_core.engine_core.scheduler.kv_cache_manager
    pool, groups = manager.block_pool, manager.kv_cache_config.kv_cache_groups
    page = max(len(group.layer_names) for group in groups) * groups[0].kv_cache_spec.page_size_bytes
    return (pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()) * page
