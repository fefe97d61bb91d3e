"""The OpenAI server, whose engine runs in a process of its own: options by environment and by command line."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.vllm import folders
from toprl_models import DivPrune, FastV, Policy, Schedule, attach, tiny
from toprl_models.integrations.vllm.options import VARIABLE

OPTIONS = {"method": "divprune", "keep": 0.25}
QUESTION = "which digit is in the picture ?"
SCENE = Path(__file__).parents[2] / "docs/scene.png"
PATIENCE = 1200  # seconds until a server must answer, on a busy machine


@contextlib.contextmanager
def server(folder: Path, log: Path, *arguments: str, **environment: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--served-model-name", "tiny"]
    command += ["--enable-prompt-tokens-details", "--enable-log-requests"]
    variables = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
    with log.open("w") as file:
        process = subprocess.Popen([*command, *arguments], env=variables, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        start = time.monotonic()
        while True:
            assert process.poll() is None and time.monotonic() < start + PATIENCE, log.read_text()[-4000:]
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def chat(url: str) -> dict[str, Any]:
    picture = io.BytesIO()
    Image.open(SCENE).convert("RGB").save(picture, "PNG")
    data = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": QUESTION}]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "add_special_tokens": True,  # the template has no beginning
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        return json.load(response)


@pytest.mark.parametrize("by", ["command line", "environment"])
def test_openai_server(by: str, tmp_path: Path) -> None:
    folder = folders.save_tiny_llava(tmp_path / "model")
    arguments, environment = [], {}
    if by == "environment":
        environment[VARIABLE] = json.dumps(OPTIONS)
    else:
        arguments = ["--additional-config", json.dumps({"toprl": OPTIONS})]
    log = tmp_path / "log"
    with server(folder, log, *arguments, **environment) as url:
        answers = [chat(url), chat(url)]
    check(answers, DivPrune(), Schedule(((0, OPTIONS["keep"]),)), dropped=48)
    text = log.read_text()
    for answer in answers:  # the second picture comes from caches
        assert answer["usage"]["prompt_tokens_details"]["toprl"] == {"kept_per_image": [16]}
        assert f"toprl: request {answer['id']}: kept_per_image [16]" in text
    assert "toprl: divprune keeps 25.0% of every image of LlavaForConditionalGeneration" in text
    assert "toprl: 1 images encoded, 16 of 64 visual tokens kept" in text


def test_openai_server_inside(tmp_path: Path) -> None:
    """Stages inside the decoder: scheduler, worker and server are processes of their own."""
    folder = folders.save_tiny_llava(tmp_path / "model")
    stages = [[2, 0.25], [4, 4]]
    arguments = ["--additional-config", json.dumps({"toprl": {"method": "fastv", "stages": stages}})]
    arguments += ["--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
    log = tmp_path / "log"
    with server(folder, log, *arguments, VLLM_LOGGING_LEVEL="DEBUG") as url:
        answers = [chat(url), chat(url)]
    check(answers, FastV(), Schedule(((2, 0.25), (4, 4))), dropped=0)
    text = log.read_text()
    for answer in answers:
        assert answer["usage"]["prompt_tokens_details"]["toprl"] == {"visual_tokens": 64, "kept_per_stage": [16, 4]}
        assert f"toprl: request {answer['id']}: visual_tokens 64, kept_per_stage [16, 4]" in text
    assert "toprl: fastv keeps 0.25 before layer 2, 4 before layer 4 of a prompt's visual tokens" in text
    assert "toprl: 1 prompts pruned, the last from 64 to [16, 4]" in text
    assert re.search(r"toprl: request \S+ keeps 4 of 64 visual tokens before layer 4: \[(\d+, ){3}\d+\]", text)


def check(answers: list[dict[str, Any]], policy: Policy, schedule: Schedule, dropped: int) -> None:
    """Compare with ``attach``; ``dropped`` tokens of the prompt are not counted."""
    model, processor = tiny.load()
    inputs = processor(images=Image.open(SCENE).convert("RGB"), text=tiny.prompt(QUESTION), return_tensors="pt")
    with attach(model, policy, schedule=schedule):
        log_probs = model(**inputs).logits[0, -1].log_softmax(-1)
    for answer in answers:
        choice = answer["choices"][0]
        (token,) = choice["logprobs"]["content"]
        assert choice["message"]["content"].strip() == processor.decode(log_probs.argmax()).strip()
        assert abs(token["logprob"] - float(log_probs.max())) < 1e-3
        assert answer["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1] - dropped
