"""vLLM with the plug-in: the answers of ``attach``, for each class and method, alone and in mixed batches."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.vllm import folders
from tests.vllm.engines import NEW_TOKENS, Answer, Request, by_attach, engine, furthest, served
from toprl_models import TopRLPolicy, tiny
from toprl_models.integrations.vllm.options import VARIABLE
from toprl_models.methods.toprl import model_signature
from training.scenes import KINDS as QUESTION_KINDS
from training.scenes import ask, make_scene

TOLERANCE = 1e-3
MINE = """\
from toprl_models import Policy


class Largest(Policy):
    uses_text = False

    def score(self, context):
        return context.hidden_states.norm(dim=-1)
"""


class Subject:
    """A model in a folder, as vLLM and as transformers see it."""

    def __init__(self, folder: Path, image: str) -> None:
        self.folder, self.image = folder, image
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.policy = str(folder / "policy")
        torch.manual_seed(3)
        width = self.model.config.get_text_config().hidden_size
        TopRLPolicy(width, [0], 16, model_signature(self.model)).save_pretrained(self.policy)
        (folder / "mine.py").write_text(MINE)

    def options(self, name: str, keep: float) -> dict[str, Any]:
        if name == "toprl":
            return {"policy": self.policy, "keep": keep}
        return {"method": f"{self.folder}/mine.py:Largest" if name == "mine" else name, "keep": keep}

    def expected(self, requests: list[Request], options: dict[str, Any] | None) -> list[Answer]:
        return by_attach(self.model, self.processor, requests, options)


@functools.cache
def subject(kind: str, root: Path) -> Subject:
    folder = root / kind
    folder.mkdir()
    if kind == "tiny":
        return Subject(folders.save_tiny_llava(folder), "<image>")
    return Subject(folders.save(kind, folder), folders.KINDS[kind].image)


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


def requests_of(kind: str, image: str) -> list[Request]:
    """A prompt for each size of picture, one with two pictures, one with none."""
    sizes = folders.KINDS[kind].sizes
    one = [Request(f"w5 {image} {folders.words(n, 3 + n)}", [folders.picture(n, size)]) for n, size in enumerate(sizes)]
    text = f"w5 {image} w7 w8 {image} {folders.words(3, 4)}"
    two = Request(text, [folders.picture(5, sizes[0]), folders.picture(6, sizes[1])])
    # with several pictures LLaVA-OneVision's processor makes a tile of each, vLLM's as many as of one alone
    return [*one, Request(folders.words(9, 7)), *([] if kind == "llava_onevision" else [two])]


CASES = [(kind, method) for kind in folders.KINDS for method in ("divprune", "random", "toprl")]
CASES += [
    ("llava", "mine"),
    *[(kind, method) for kind in ("llava", "llava_next") for method in ("visionzip", "fastervlm")],
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_every_class(kind: str, method: str, root: Path) -> None:
    """Alone and together, with pictures of different sizes; fewer tokens in the prompt, and other answers."""
    its = subject(kind, root)
    requests, options = requests_of(kind, its.image), its.options(method, 0.5)
    if method == "visionzip" and kind != "llava":  # shares follow the sizes of all pictures of a prompt
        requests = [request for request in requests if len(request.images) < 2]
    with engine(its.folder, options) as llm:
        together = served(llm, requests)
        alone = [served(llm, [request])[0] for request in requests]
    expected, full = its.expected(requests, options), its.expected(requests, None)
    assert furthest(together, expected) < TOLERANCE
    assert furthest(alone, expected) < TOLERANCE
    with_images = [number for number, request in enumerate(requests) if request.images]
    assert all(together[number].prompt_tokens < full[number].prompt_tokens for number in with_images)
    assert all(furthest([together[number]], [full[number]]) > 10 * TOLERANCE for number in with_images)


def mixed(requests: list[Request]) -> list[Request]:
    """Scene questions with others among them: of every eight one has a second picture, one is text alone."""
    made = list(requests)
    for number in range(0, len(requests), 8):
        one, other = requests[number], requests[number + 1]
        made[number] = Request(f"{tiny.IMAGE} {one.text}", [*one.images, *other.images])
        made[number + 1] = Request(other.text.replace(tiny.IMAGE, "").strip())
    return made


def furthest_in_batches(
    llm: Any, requests: list[Request], expected_of: Callable[[list[Request]], Any], ties: int = 0
) -> float:
    """Compare answers one by one, and 64 at a time with others among them that end earlier and later.

    ``ties`` of them may be further: those where scores are equal but for rounding.
    """
    others = mixed(requests)
    alone = [served(llm, [request], [2])[0] for request in requests]
    together = served(llm, others, [1 + number % NEW_TOKENS for number in range(len(others))])
    each = [*requests, *(other for other, request in zip(others, requests, strict=True) if other is not request)]
    expected = dict(zip(map(id, each), expected_of(each), strict=True))
    worst = []
    for answers, asked in ((alone, requests), (together, others)):
        pairs = zip(answers, asked, strict=True)
        distances = sorted(furthest([answer], [expected[id(request)]]) for answer, request in pairs)
        worst.append(distances[-1 - ties])
    return max(worst)


def scene_requests(count: int) -> tuple[list[Request], list[str]]:
    """Questions of all six kinds about test scenes, and their answers."""
    draw = np.random.default_rng(0)
    requests, answers = [], []
    from PIL import Image

    for number in range(count):
        scene = make_scene(draw, "test")
        question = ask(draw, scene, QUESTION_KINDS[number % len(QUESTION_KINDS)])
        requests.append(Request(tiny.prompt(question.question), [Image.fromarray(scene.pixels)]))
        answers.append(question.answer)
    return requests, answers


METHODS = ("divprune", "visionzip", "fastervlm", "random", "toprl", "mine")


@pytest.mark.parametrize(("method", "keep"), [*[(name, 0.25) for name in METHODS], ("divprune", 8), ("toprl", 8)])
def test_embedded_model(method: str, keep: float, root: Path) -> None:
    """Real answers to 256 questions of six kinds."""
    its = subject("tiny", root)
    requests, _ = scene_requests(256)
    options = its.options(method, keep)
    with engine(its.folder, options) as llm:
        assert furthest_in_batches(llm, requests, lambda asked: its.expected(asked, options)) < TOLERANCE


def test_embedded_model_answers(root: Path) -> None:
    """Unpruned, the embedded model is right as often as in transformers; so the questions ask something."""
    its = subject("tiny", root)
    requests, right = scene_requests(96)
    with engine(its.folder) as llm:
        answers = served(llm, requests)
    said = [its.processor.decode(answer.tokens[:1]).strip() for answer in answers]
    assert np.mean([one == other for one, other in zip(said, right, strict=True)]) > 0.7


@pytest.mark.parametrize("kind", ["tiny", "qwen2_5_vl"])
def test_off_is_off(kind: str, root: Path) -> None:
    """Without options the numbers are, bit by bit, those of a vLLM that loads no plug-in; so are those of keep = 1."""
    its = subject(kind, root)
    requests = scene_requests(12)[0] if kind == "tiny" else requests_of(kind, its.image)
    with engine(its.folder) as llm:
        without = served(llm, requests)
        assert "Toprl" not in llm.llm_engine.vllm_config.model_config.architecture
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "")
        stored = its.folder / "unpruned.pt"
        script = (
            "import sys, torch; from pathlib import Path; from tests.vllm import test_plugin as t, engines, folders\n"
            f"kind, image = {kind!r}, {its.image!r}\n"
            "requests = t.scene_requests(12)[0] if kind == 'tiny' else t.requests_of(kind, image)\n"
            f"with engines.engine(Path({str(its.folder)!r})) as llm: answers = engines.served(llm, requests)\n"
            f"torch.save([answer.log_probs for answer in answers], {str(stored)!r})\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
    assert all(torch.equal(a.log_probs, b) for a, b in zip(without, torch.load(stored), strict=True))
    with engine(its.folder, its.options("divprune", 1.0)) as llm:
        everything = served(llm, requests)
    assert furthest(everything, without) == 0


CACHING = {
    "prefix caching": {"enable_prefix_caching": True},
    "chunked prefill": {
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 24,
        "max_num_seqs": 4,
    },
    "no processor cache": {"mm_processor_cache_gb": 0},
}


@pytest.mark.parametrize("settings", CACHING.values(), ids=CACHING)
@pytest.mark.parametrize(("kind", "method"), [("llava", "divprune"), ("llava", "random"), ("qwen2_5_vl", "toprl")])
def test_caches_and_chunks(kind: str, method: str, settings: dict[str, Any], root: Path) -> None:
    """The same requests twice, so that the second time everything comes from caches; chunks that cut images."""
    its = subject(kind, root)
    options = its.options(method, 0.75)
    texts = [f"{folders.words(20, 20)} {its.image} {folders.words(n, 5)}" for n in range(3)]
    sizes = folders.KINDS[kind].sizes
    requests = [Request(text, [folders.picture(n % 2, sizes[n % 2])]) for n, text in enumerate(texts)]
    with engine(its.folder, options, **settings) as llm:
        first, second = served(llm, requests), served(llm, requests)
    expected = its.expected(requests, options)
    assert furthest(first, expected) < TOLERANCE
    assert furthest(second, expected) < TOLERANCE


def test_tensor_parallel(root: Path) -> None:
    its = subject("llava", root)
    requests, options = requests_of("llava", its.image), its.options("toprl", 0.5)
    with engine(its.folder, options, tensor_parallel_size=2) as llm:
        answers = served(llm, requests)
    assert furthest(answers, its.expected(requests, options)) < TOLERANCE


def test_cache_keys_know_the_method(root: Path) -> None:
    its = subject("llava", root)
    request = Request(f"w5 {its.image} w7", [folders.picture(0, (32, 32))])
    hashes = []
    for keep in (0.5, 0.25):
        with engine(its.folder, its.options("divprune", keep)) as llm:
            prompt = {"prompt": request.text, "multi_modal_data": {"image": request.images}}
            (made,) = llm.renderer.render_cmpl([prompt])
            hashes += made["mm_hashes"]["image"]
            assert hashes[-1].endswith(llm.llm_engine.vllm_config.model_config.hf_config.toprl["digest"])
    assert len(set(hashes)) == 2


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"method": "divprunes", "keep": 0.5}, {}, "method 'divprunes' is unknown"),
        ({"method": "divprune", "keep": 2.0}, {}, "keep=2.0 must be"),
        ({"method": "fastv", "keep": 0.5}, {}, "reads attention inside the decoder"),
        ({"policy": "no/such/folder", "keep": 0.5}, {}, "policy=no/such/folder: give a folder"),
        ({"method": "divprune", "keep": 0.5}, {"enable_mm_embeds": True}, "cannot run with --enable-mm-embeds"),
        ({"method": "random", "keep": 0.5}, {"pipeline_parallel_size": 2}, "--pipeline-parallel-size above 1"),
        ({"method": "visionzip", "keep": 0.5}, {"tensor_parallel_size": 2}, "--tensor-parallel-size above 1"),
    ],
)
def test_errors_at_start(options: dict, settings: dict, message: str, root: Path) -> None:
    its = subject("llava", root)
    with pytest.raises(ValueError, match=message), engine(its.folder, options, **settings):
        pass


def test_other_models_are_refused(root: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.models.tiny_families import text_config

    LlamaForCausalLM(LlamaConfig(**text_config(head_dim=32))).save_pretrained(tmp_path)
    subject("llava", root).processor.tokenizer.save_pretrained(tmp_path)
    with (
        pytest.raises(ValueError, match=r"LlamaForCausalLM .* cannot be pruned in vLLM; classes that can: Llava"),
        engine(tmp_path, {"method": "divprune", "keep": 0.5}),
    ):
        pass


def test_other_versions_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.30.0")
    with (
        pytest.raises(ValueError, match=r"vLLM 0\.30\.0 is installed, but the plug-in knows .* pip install"),
        engine(subject("llava", root).folder, {"method": "divprune", "keep": 0.5}),
    ):
        pass


def test_options_from_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    its = subject("llava", root)
    requests, options = requests_of("llava", its.image)[:1], its.options("divprune", 0.5)
    monkeypatch.setenv(VARIABLE, json.dumps(options))
    with engine(its.folder) as llm:
        assert furthest(served(llm, requests), its.expected(requests, options)) < TOLERANCE
