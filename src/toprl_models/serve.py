"""transformers' own server (OpenAI's API) with a pruned model.

    python -m toprl_models.serve MODEL --method fastv --keep 0.25 --port 8000
    python -m toprl_models.serve MODEL --policy runs/ocr/policy --keep 0.25

It is put together from the parts of ``transformers serve``, of which three are replaced: models are attached when they
are loaded, the queue of requests notices clients that have gone, and images are measured before they are decoded.
Needs the extra ``serve``. See docs/serve_transformers.md.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import io
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, PreTrainedConfig
from transformers.image_utils import load_image

from toprl_models.command import parser_of
from toprl_models.integrations.lmms_eval import PruningArguments, load_policy, skeleton, trained_parts
from toprl_models.policy import Policy
from toprl_models.pruner import Pruner, attach
from toprl_models.registry import layers_for, method_of, schedule_for
from toprl_models.schedule import Schedule

try:
    import uvicorn
    from fastapi import HTTPException
    from transformers.cli.serving import ModelManager, build_server
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerateManager, GenerationState
except (ImportError, NameError) as error:  # transformers' modules have names that the missing packages define
    raise ImportError(
        f"the server needs packages that are missing or too old: pip install 'toprl-kernels[serve]' ({error})"
    ) from error

MAX_PIXELS = 7680 * 4320  # a picture of an 8K camera; decoding stops the other requests meanwhile
LOG = logging.getLogger("uvicorn.error")  # uvicorn's, for messages that are no access


class ClientGone:
    """Stopping criterion of ``generate()``: the client does not wait for the answer any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def in_turn(generate: Callable[..., Tensor], pruner: Pruner, lock: threading.Lock) -> Callable[..., Tensor]:
    """Wrap ``generate`` so that calls wait for each other, and log a line for each.

    A Pruner refuses a second thread. transformers' server has one thread for each model, which is no promise.
    """

    @functools.wraps(generate)
    def call(*, input_ids: Tensor, **options: Any) -> Tensor:
        gone = next((each for each in options.get("stopping_criteria", ()) if isinstance(each, ClientGone)), None)
        with lock:
            if gone is not None and gone.event.is_set():
                LOG.info("request dropped before its turn: the client is gone")
                return input_ids
            pruner.trace = []
            begin = time.perf_counter()
            try:
                output = generate(input_ids=input_ids, **options)
            except Exception as error:
                LOG.error(f"request: {input_ids.shape[1]} prompt tokens, failed: {type(error).__name__}: {error}")
                raise
            new, seconds = output.shape[1] - input_ids.shape[1], time.perf_counter() - begin
            stages = [f"{stage.counts[0]} before layer {stage.layer}" for stage in pruner.trace]
            visual = " -> ".join([str(pruner.trace[0].num_visual[0]), *stages]) if stages else "none"
            stopped = ", stopped: the client is gone" if gone is not None and gone.event.is_set() else ""
            LOG.info(
                f"request: {input_ids.shape[1]} prompt tokens, visual tokens {visual}, {new} new tokens, "
                f"{seconds:.3f} s{stopped}"
            )
            return output

    return call


class PrunedModels(ModelManager):
    """Attaches the model whenever transformers' server loads it: at start, and again after POST /reset."""

    def __init__(self, policy: Policy, schedule: Schedule, max_pixels: int, **options: Any) -> None:
        self.policy, self.schedule, self.max_pixels = policy, schedule, max_pixels
        self.lock = threading.Lock()
        self.served: str | None = None
        super().__init__(**options)  # loads the model

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **options: Any) -> tuple[Any, Any]:
        """Return the attached model and its processor.

        Raises:
            ValueError: another model than that of the command line, which the policy is not for.
        """
        self.served = self.served or model_id_and_revision
        if model_id_and_revision != self.served:
            raise ValueError(f"model {model_id_and_revision!r} is not served here, only {self.served!r}")
        model, processor = super().load_model_and_processor(model_id_and_revision, *args, **options)
        if getattr(model.generate, "pruner", None) is None:
            with self.lock:  # an answer of the model before a reset may be on its way, with the same policy
                for trained in trained_parts(self.policy):
                    trained.to(model.device)
                pruner = attach(model, self.policy, schedule=self.schedule)
                model.generate = in_turn(model.generate, pruner, self.lock)
                model.generate.pruner = pruner
        return model, processor


class Requests(GenerateManager):
    """Queue of requests to the model, in which those of clients that have gone stop."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **options: Any) -> tuple:
        gone = ClientGone()
        inputs = {**inputs, "stopping_criteria": [gone]}
        queue, streamer = super().generate_streaming(model, processor, inputs, *args, **options)
        streamer.cancel = gone.event.set  # the server calls it when the client disconnects
        return queue, streamer

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        gone = ClientGone()
        inputs = {**inputs, "stopping_criteria": [gone]}
        answer = asyncio.ensure_future(super().generate_non_streaming(model, processor, inputs, *args, **options))
        try:
            return await asyncio.shield(answer)  # the model's thread delivers a result, wanted or not
        except asyncio.CancelledError:
            gone.event.set()
            raise


class OneQueue(GenerationState):
    """One queue for the one model, without continuous batching."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = Requests()

    def get_manager(self, model_id: str, use_cb: bool = False) -> Requests:
        return self.requests


class CancelWhenGone:
    """ASGI middleware: cancels a request when its client disconnects, also before an answer has begun."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: asyncio.Queue = asyncio.Queue()

        async def listen() -> None:
            while True:
                message = await receive()
                messages.put_nowait(message)
                if message["type"] == "http.disconnect":
                    return

        tasks = [asyncio.ensure_future(self.app(scope, messages.get, send)), asyncio.ensure_future(listen())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            answered = tasks[0].done()
            for task in tasks:
                task.cancel()
        await asyncio.wait(tasks)
        if answered:
            await tasks[0]  # raises what the app raised


def open_image(url: str, max_pixels: int) -> Image.Image:
    """Open the image of a request: a data URL, or what else ``transformers.image_utils.load_image`` takes.

    Raises:
        HTTPException: status 400, no image, or one of more than ``max_pixels``.
    """
    try:
        if url.startswith("data:"):  # its size is read before it is decoded
            image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        else:
            image = load_image(url)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise HTTPException(400, f"image {url[:60]!r} cannot be read (--max_pixels {max_pixels}): {reason}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise HTTPException(
            400,
            f"image of {width} x {height} = {width * height} pixels: this server takes at most {max_pixels} "
            "(--max_pixels); send a smaller one",
        )
    return image


class OpensImages:
    """Handler of requests that opens their images itself."""

    model_manager: PrunedModels

    def get_processor_inputs_from_messages(self, messages: list[dict], modality: Any) -> list[dict]:
        found = super().get_processor_inputs_from_messages(messages, modality)  # type: ignore[misc]
        for message in found:
            for part in message["content"]:
                if isinstance(part, dict) and part["type"] == "image":
                    part["image"] = open_image(part.pop("url"), self.model_manager.max_pixels)
        return found


class Chat(OpensImages, ChatCompletionHandler):
    """Answer /v1/chat/completions."""


class Responses(OpensImages, ResponseHandler):
    """Answer /v1/responses."""


def prepare(config: PreTrainedConfig, options: argparse.Namespace) -> tuple[Policy, Schedule]:
    """Make policy and schedule of a command line, tried on a model without weights.

    Raises:
        ValueError: unknown method, an impossible budget, or a policy that does not go with method or model.
        TypeError: a class of models that cannot be pruned.
    """
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise TypeError(f"a {config.model_type} model takes no images; name an image-text model of docs/families.md")
    method = method_of(options.method)
    if options.policy is not None and not method.trained:
        raise ValueError(f"--policy {options.policy}: --method {method.name} takes no policy; leave one of the two out")
    if options.budget is not None:
        return PruningArguments(options.method, options.budget, options.policy, None, options.num_visual).prepare(
            config
        )
    if options.num_visual is not None:
        raise ValueError(f"--num_visual {options.num_visual}: --keep is a share of any number; leave it out")
    trained = None if options.policy is None else load_policy(options.policy)
    model = skeleton(config)
    layers = layers_for(method, model, () if trained is None else trained.stage_layers)
    policy, schedule = method.make(layers, trained), schedule_for(model, method.name, keep=options.keep, layers=layers)
    attach(model, policy, schedule=schedule).detach()
    return policy, schedule


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line."""
    parser = parser_of("serve", __doc__)
    parser.add_argument("model", help="folder or Hub id; requests name the model so, too")
    parser.add_argument("--method", help="a name, my_file.py:MyMethod, or several joined by +; toprl with --policy")
    parser.add_argument("--policy", help="folder or Hub id of a trained policy")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--keep", type=float, help="share of the visual tokens, averaged over all decoder layers")
    budget.add_argument("--budget", type=float, help="visual tokens, averaged over all decoder layers")
    parser.add_argument("--num_visual", type=int, help="what --budget is out of, where images differ in it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    parser.add_argument("--device", default="auto", help="as in transformers serve (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="as in transformers serve (%(default)s)")
    parser.add_argument("--max_pixels", type=int, default=MAX_PIXELS, help="largest image (%(default)s)")
    parser.add_argument("--continuous_batching", "--continuous-batching", action="store_true", help="refused")
    options = parser.parse_args(arguments)
    if options.continuous_batching:
        parser.error("--continuous_batching would run unpruned; leave it out: requests in parallel wait in a queue")
    if options.method is None and options.policy is None:
        parser.error("--method is missing: give --method fastv (or another of docs/methods.md) or --policy FOLDER")
    options.method = options.method or "toprl"
    if options.max_pixels < 1:
        parser.error(f"--max_pixels {options.max_pixels} must be positive")
    return parser, options


def make_server(arguments: Sequence[str] | None = None) -> uvicorn.Server:
    """Load and attach the model of a command line, and make its server, which ``run()`` starts.

    Raises:
        SystemExit: status 2; the command line is wrong, or does not go with the model. A message says why.
    """
    parser, options = parse(arguments)
    try:
        name, _, revision = ModelManager.process_model_name(options.model).partition("@")
        policy, schedule = prepare(AutoConfig.from_pretrained(name, revision=revision), options)
        models = PrunedModels(
            policy,
            schedule,
            options.max_pixels,
            device=options.device,
            dtype=options.dtype,
            force_model=options.model,
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        parser.error(f"{options.model}: {error}")
    queue = OneQueue()
    app = build_server(
        models,
        Chat(models, queue),
        completion_handler=CompletionHandler(models, queue),
        response_handler=Responses(models, queue),
        transcription_handler=TranscriptionHandler(models, queue),
        systemone_handler=SystemOneHandler(models, queue),
        generation_state=queue,
    )
    app.add_middleware(CancelWhenGone)
    server = uvicorn.Server(uvicorn.Config(app, host=options.host, port=options.port, log_level="info"))
    LOG.info(f"{options.model} is pruned by {options.method}: {schedule}")
    return server


if __name__ == "__main__":
    make_server().run()
