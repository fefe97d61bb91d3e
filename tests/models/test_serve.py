"""transformers' own server with a pruned model, asked by the ``openai`` client.

The server and its client are imported by the tests that run: older releases have no such server.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from toprl_models import FastV, TopRLPolicy, attach, schedule_for, tiny

pytestmark = pytest.mark.since("5.23")  # as the extra "serve"
ROOT = Path(__file__).parents[2]
MODEL, COMMAND = str(tiny.CHECKPOINT), ("--method", "fastv", "--keep", "0.25")
SCENE = Image.open(ROOT / "docs" / "scene.png").convert("RGB")
TURNED = [SCENE, *(SCENE.transpose(way) for way in Image.Transpose)]
QUESTIONS = ("which digit is in the picture ?", "how many shapes are there ?")
FEW, MANY = 6, 800  # tokens of an answer; the model stops after one if it may
REQUEST = re.compile(
    r"request: (\d+) prompt tokens, visual tokens (.*), (\d+) new tokens, \d+\.\d+ s(, stopped: the client is gone)?$"
)


class Served:
    """A running server, its client, and what it logged."""

    def __init__(self, server: Any, port: int) -> None:
        import openai

        self.server, self.url, self.lines = server, f"http://127.0.0.1:{port}", list[str]()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(self, image: Image.Image | str | None, question: str, tokens: int = FEW, **options: Any) -> Any:
        content: list[Any] = [{"type": "text", "text": question}]
        if image is not None:
            url = image if isinstance(image, str) else data_url(image)
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        config = json.dumps({"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False})
        return self.client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": content}],
            extra_body={"generation_config": config},
            **options,
        )

    def requests(self, number: int) -> list[tuple[str, ...]]:
        """Wait for the lines of ``number`` requests: prompt tokens, visual tokens, new tokens, whether stopped."""
        deadline = time.monotonic() + 30
        while len(found := [match.groups() for line in self.lines if (match := REQUEST.match(line))]) < number:
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.01)
        return found


@contextmanager
def bad_request(match: str) -> Iterator[None]:
    """Expect status 400 with a detail that matches; the client itself shows the status alone."""
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        yield
    assert re.search(match, caught.value.body["detail"])


def data_url(image: Image.Image, kind: str = "png") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def text_of(completion: Any) -> str:
    return completion.choices[0].message.content


@contextmanager
def running(*arguments: str) -> Iterator[Served]:
    from toprl_models.serve import LOG, make_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = make_server([MODEL, *arguments, "--port", str(port), "--device", "cpu", "--dtype", "float32"])
    found = Served(server, port)
    handler = logging.Handler()
    handler.emit = lambda record: found.lines.append(record.getMessage())  # type: ignore[method-assign]
    LOG.addHandler(handler)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), found.lines
            time.sleep(0.01)
        yield found
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        LOG.removeHandler(handler)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def module_server() -> Iterator[Served]:
    with running(*COMMAND) as served:
        yield served


@pytest.fixture
def served(module_server: Served) -> Served:
    module_server.lines.clear()
    return module_server


@pytest.fixture(scope="module")
def in_process() -> Any:
    """Answers of attach() and generate(), and the tokens that the one stage keeps."""
    model, processor = tiny.load()
    schedule = schedule_for(model, "fastv", keep=0.25)
    length = {"max_new_tokens": FEW, "min_new_tokens": FEW, "do_sample": False}

    def answer(image: Image.Image, question: str) -> str:
        inputs = processor(images=image, text=tiny.prompt(question), return_tensors="pt")
        with attach(model, FastV(), schedule=schedule):
            output = model.generate(**inputs, **length)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer, schedule.counts(tiny.NUM_VISUAL_TOKENS)[0]


def test_an_image_question(served: Served, in_process: Any) -> None:
    answer, kept = in_process
    completion = served.ask(SCENE, QUESTIONS[0])
    assert text_of(completion) == answer(SCENE, QUESTIONS[0])
    assert completion.usage.completion_tokens == FEW
    visual = f"{tiny.NUM_VISUAL_TOKENS} -> {kept} before layer 1"
    assert served.requests(1) == [(str(completion.usage.prompt_tokens), visual, str(FEW), None)]


def test_pruning_changes_the_answers(served: Served) -> None:
    """So that the tests of equal answers can fail."""
    model, processor = tiny.load()
    inputs = [processor(images=image, text=tiny.prompt(QUESTIONS[1]), return_tensors="pt") for image in TURNED[:4]]
    plain = [model.generate(**each, max_new_tokens=FEW, min_new_tokens=FEW)[0, -FEW:] for each in inputs]
    plain_texts = [processor.decode(ids, skip_special_tokens=True) for ids in plain]
    assert [text_of(served.ask(image, QUESTIONS[1])) for image in TURNED[:4]] != plain_texts


def test_streaming(served: Served) -> None:
    whole = text_of(served.ask(SCENE, QUESTIONS[0]))
    chunks = list(served.ask(SCENE, QUESTIONS[0], stream=True))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(texts) > 1
    assert "".join(texts) == whole
    first, second = served.requests(2)
    assert first == second


def test_the_responses_api(served: Served, in_process: Any) -> None:
    content = [
        {"type": "input_image", "image_url": data_url(SCENE)},
        {"type": "input_text", "text": QUESTIONS[0]},
    ]
    response = served.client.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": content}],
        extra_body={"generation_config": json.dumps({"min_new_tokens": FEW, "do_sample": False})},
        max_output_tokens=FEW,
        stream=False,
    )
    assert response.output_text == in_process[0](SCENE, QUESTIONS[0])


def test_requests_in_parallel(served: Served) -> None:
    """Half of them stream."""
    asked = [(image, question) for image in TURNED for question in QUESTIONS][:16]
    alone = [text_of(served.ask(*each)) for each in asked]
    assert len(set(alone)) > 4

    def ask(number: int) -> str:
        if number % 2:
            return text_of(served.ask(*asked[number]))
        chunks = served.ask(*asked[number], stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    assert together == alone
    assert len(served.requests(32)) == 32


def test_threads_of_the_process_wait_for_each_other() -> None:
    """Whatever threads transformers' server has: without the lock, the Pruner refuses all but one."""
    from toprl_models.serve import in_turn

    model, processor = tiny.load()
    inputs = processor(images=SCENE, text=tiny.prompt(QUESTIONS[0]), return_tensors="pt")
    barrier = threading.Barrier(4)
    with attach(model, FastV(), schedule=schedule_for(model, "fastv", keep=0.25)) as pruner:
        call = in_turn(model.generate, pruner, threading.Lock())

        def generate(_: int) -> torch.Tensor:
            barrier.wait()
            return call(**inputs, max_new_tokens=FEW, min_new_tokens=FEW)

        with ThreadPoolExecutor(4) as pool:
            first, *others = pool.map(generate, range(4))
    assert all(torch.equal(first, other) for other in others)


def test_a_client_that_disconnects_from_a_stream(served: Served) -> None:
    stream = served.ask(SCENE, QUESTIONS[0], MANY, stream=True)
    for _ in range(3):
        next(stream)
    stream.close()
    served.ask(SCENE, QUESTIONS[1])
    (_, _, new, stopped), (*_, not_stopped) = served.requests(2)
    assert stopped and int(new) < MANY
    assert not not_stopped


def test_clients_that_do_not_wait_for_their_answers(served: Served) -> None:
    """The next request comes after theirs in the queue, and none of them ran to its end."""
    import openai

    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(served.ask, SCENE, QUESTIONS[0], MANY, timeout=0.5) for _ in range(2)]
        for wait in waits:
            with pytest.raises(openai.APITimeoutError):
                wait.result()
    served.ask(SCENE, QUESTIONS[1])
    *gone, (_, _, new, stopped) = served.requests(1)
    assert all(stopped and int(new) < MANY for _, _, new, stopped in gone)
    assert int(new) == FEW and not stopped


def test_a_client_that_has_gone_before_its_turn() -> None:
    from toprl_models.serve import ClientGone, in_turn

    model, processor = tiny.load()
    inputs = processor(images=SCENE, text=tiny.prompt(QUESTIONS[0]), return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    gone = ClientGone()
    with attach(model, FastV(), schedule=schedule_for(model, "fastv", keep=0.25)) as pruner:
        call = in_turn(model.generate, pruner, threading.Lock())
        assert call(**inputs, max_new_tokens=1, stopping_criteria=[gone]).shape[1] == length + 1
        gone.event.set()
        assert call(**inputs, max_new_tokens=1, stopping_criteria=[gone]).shape[1] == length


@pytest.mark.parametrize("stream", [False, True])
def test_an_image_of_fifty_megapixels(served: Served, stream: bool) -> None:
    image = data_url(Image.new("1", (10000, 5000)))
    with bad_request(r"10000 x 5000 = 50000000 pixels.*at most 33177600 \(--max_pixels"):
        served.ask(image, QUESTIONS[0], stream=stream)
    served.ask(SCENE, QUESTIONS[0])
    assert len(served.requests(1)) == 1


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "no_such_file.png"])
def test_something_that_is_no_image(served: Served, url: str) -> None:
    with bad_request("cannot be read"):
        served.ask(url, QUESTIONS[0])


def test_a_request_without_image(served: Served) -> None:
    model, processor = tiny.load()
    inputs = processor(text=f"{QUESTIONS[0]} {tiny.ANSWER}", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=FEW, min_new_tokens=FEW)[0, -FEW:]
    assert text_of(served.ask(None, QUESTIONS[0])) == processor.decode(plain, skip_special_tokens=True)
    assert served.requests(1)[0][1] == "none"


def test_health_while_a_request_runs(served: Served) -> None:
    stream = served.ask(SCENE, QUESTIONS[0], MANY, stream=True)
    for _ in range(3):
        next(stream)
    with urllib.request.urlopen(f"{served.url}/health", timeout=10) as response:
        assert json.load(response) == {"status": "ok"}
    stream.close()
    assert served.requests(1)[0][3]


def test_a_reset_leaves_no_unpruned_model(served: Served) -> None:
    before = text_of(served.ask(SCENE, QUESTIONS[1]))
    urllib.request.urlopen(urllib.request.Request(f"{served.url}/reset", method="POST"), timeout=10).close()
    assert text_of(served.ask(SCENE, QUESTIONS[1])) == before
    first, second = served.requests(2)
    assert first == second and first[1] != "none"


def test_another_model_is_refused(served: Served) -> None:
    with bad_request("pinned to"):
        served.client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hello"}])
    body = json.dumps({"model": "other"}).encode()
    request = urllib.request.Request(f"{served.url}/load_model", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        assert "is not served here" in response.read().decode()


def test_a_trained_policy(tmp_path: Path) -> None:
    model, _ = tiny.load()
    TopRLPolicy(tiny.HIDDEN_SIZE, [1, 2], 16).save_pretrained(tmp_path)
    with running("--policy", str(tmp_path), "--budget", "24") as served:
        served.ask(SCENE, QUESTIONS[0])
        kept = schedule_for(model, "toprl", average_tokens=24, num_visual=64, layers=(1, 2)).counts(64)
        assert served.requests(1)[0][1] == f"64 -> {kept[0]} before layer 1 -> {kept[1]} before layer 2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([MODEL, "--method", "fastvv", "--keep", "0.25"], "method 'fastvv' is unknown; known methods: .*fastv"),
        ([MODEL, "--keep", "0.25"], "--method is missing: give --method fastv"),
        ([MODEL, "--method", "fastv"], "--keep --budget is required"),
        ([MODEL, *COMMAND, "--budget", "3"], "not allowed with argument"),
        ([MODEL, "--method", "fastv", "--keep", "0.1"], r"keep=0\.1 is impossible.*between 0\.167 and 1"),
        ([MODEL, "--method", "fastv", "--budget", "65"], "budget=65.* lies between 10.6667 and 64"),
        ([MODEL, *COMMAND, "--num_visual", "64"], "--num_visual 64: .*leave it out"),
        ([MODEL, "--method", "toprl", "--keep", "0.25"], "'toprl' needs a trained policy: the folder"),
        ([MODEL, *COMMAND, "--policy", "x"], "--policy x: --method fastv takes no policy; leave one of the two out"),
        ([MODEL, "--policy", "no/policy/here", "--keep", "0.25"], "policy=no/policy/here: give a folder"),
        ([MODEL, *COMMAND, "--max_pixels", "0"], "--max_pixels 0 must be positive"),
        ([MODEL, *COMMAND, "--continuous_batching"], "--continuous_batching would run unpruned; leave it out"),
        ([MODEL, *COMMAND, "--continuous-batching"], "--continuous_batching would run unpruned; leave it out"),
        ([MODEL, *COMMAND, "--dtype", "int5"], "under `dtype=torch.int5`"),
        (["no/folder/here", *COMMAND], "no/folder/here"),
        ([str(ROOT / "docs"), *COMMAND], "config.json"),
    ],
)
def test_a_command_line_that_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    from toprl_models.serve import make_server

    with pytest.raises(SystemExit) as stopped:
        make_server(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err.split("error: ")[-1], flags=re.DOTALL)


def test_a_model_without_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from toprl_models.serve import make_server

    tiny.load()[0].config.text_config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        make_server([str(tmp_path), *COMMAND])
    assert "a llama model takes no images; name an image-text model" in capsys.readouterr().err
