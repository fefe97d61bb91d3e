"""vLLM's front end: requests that are refused one by one, and what the OpenAI server says was kept of a request."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from toprl_models.integrations.vllm.options import KEY

logger = init_logger("vllm.toprl")
CHAT = "vllm.entrypoints.openai.chat_completion.serving"
BEAMS = "vllm.entrypoints.generate.beam_search"


class _Counts(dict):
    """vLLM's counts of tokens of each modality, with our note beside them."""

    note: dict[str, Any]


def note(inputs: Any, **kept: Any) -> None:
    """Store what is ``kept`` beside a processed prompt, where the server finds it.

    The server says it with ``--enable-prompt-tokens-details`` as ``usage.prompt_tokens_details.toprl``, and with
    ``--enable-log-requests`` in its log, under the request's id.
    """
    inputs[KEY] = kept
    hook()


def hook() -> None:
    """Hook what this process has loaded of the front end, once; nothing of it is loaded for that."""
    from vllm.v1.engine.input_processor import InputProcessor

    _once(InputProcessor, _refuse_prompt_logprobs)
    if chat := sys.modules.get(CHAT):
        _once(chat, _tell_notes)
    if online := sys.modules.get(f"{BEAMS}.online"):
        _once(online.BeamSearchOnlineMixin, _refuse_beams)
    if offline := sys.modules.get(f"{BEAMS}.offline"):
        _once(offline.BeamSearchOfflineMixin, _refuse_beams)


def _once(place: Any, hook_into: Callable[[Any], None]) -> None:
    if not hasattr(place, KEY):
        setattr(place, KEY, True)
        hook_into(place)


def _has_stages(model_config: Any) -> bool:
    stored = getattr(model_config.hf_config, KEY, None)
    return stored is not None and stored["stages"] is not None


def _refuse_prompt_logprobs(processor: Any) -> None:
    validate = processor._validate_params

    @functools.wraps(validate)
    def check_and_validate(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if _has_stages(self.model_config) and getattr(params, "prompt_logprobs", None) is not None:
            raise ValueError(f"{KEY}: prompt_logprobs: tokens that a stage drops have none; leave it out")
        return validate(self, params, *args, **kwargs)

    processor._validate_params = check_and_validate


def _refuse_beams(searching: Any) -> None:
    search = searching.beam_search

    @functools.wraps(search)
    def check_and_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = self.llm_engine if hasattr(self, "llm_engine") else self.engine_client
        if _has_stages(engine.vllm_config.model_config):
            raise ValueError(
                f"{KEY}: beam search would prune each beam anew, with its answer as part of the question: use n, or "
                "prune before the language model, by keep"
            )
        return search(self, *args, **kwargs)

    searching.beam_search = check_and_search


def _tell_notes(serving: Any) -> None:
    count, details = serving._get_mm_token_counts, serving._make_prompt_tokens_details
    log = serving.OpenAIServingChat._log_inputs

    @functools.wraps(count)
    def count_and_note(engine_input: Any) -> dict[str, int]:
        counts = count(engine_input)
        if KEY in engine_input:
            counts = _Counts(counts)
            counts.note = engine_input[KEY]
        return counts

    @functools.wraps(details)
    def details_and_note(*args: Any, **kwargs: Any) -> Any:
        made = details(*args, **kwargs)
        for counts in (*args, *kwargs.values()):
            if made is not None and isinstance(counts, _Counts):
                setattr(made, KEY, counts.note)
        return made

    @functools.wraps(log)
    def log_and_note(self: Any, request_id: str, inputs: Any, *args: Any, **kwargs: Any) -> None:
        log(self, request_id, inputs, *args, **kwargs)
        if self.request_logger is not None and KEY in inputs:
            kept = ", ".join(f"{name} {value}" for name, value in inputs[KEY].items())
            logger.info("toprl: request %s: %s", request_id, kept)

    serving._get_mm_token_counts, serving._make_prompt_tokens_details = count_and_note, details_and_note
    serving.OpenAIServingChat._log_inputs = log_and_note
