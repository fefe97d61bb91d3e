"""The OpenAI server, whose engine runs in a process of its own: options by environment and by command line."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
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
from toprl_models import DivPrune, Schedule, attach, tiny
from toprl_models.integrations.vllm.options import VARIABLE

OPTIONS = {"method": "divprune", "keep": 0.25}
QUESTION = "which digit is in the picture ?"
SCENE = Path(__file__).parents[2] / "docs/scene.png"
PATIENCE = 600  # seconds until a server must answer, on a busy machine


@contextlib.contextmanager
def server(folder: Path, log: Path, *arguments: str, **environment: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--served-model-name", "tiny"]
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
        first, second = chat(url), chat(url)
    model, processor = tiny.load()
    inputs = processor(images=Image.open(SCENE).convert("RGB"), text=tiny.prompt(QUESTION), return_tensors="pt")
    with attach(model, DivPrune(), schedule=Schedule(((0, OPTIONS["keep"]),))):
        log_probs = model(**inputs).logits[0, -1].log_softmax(-1)
    for answer in (first, second):
        choice = answer["choices"][0]
        (token,) = choice["logprobs"]["content"]
        assert choice["message"]["content"].strip() == processor.decode(log_probs.argmax()).strip()
        assert abs(token["logprob"] - float(log_probs.max())) < 1e-3
        assert answer["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1] - 48
    text = log.read_text()
    assert "toprl: divprune keeps 25.0% of every image of LlavaForConditionalGeneration" in text
    assert "toprl: 1 images encoded, 16 of 64 visual tokens kept" in text
