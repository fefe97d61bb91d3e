"""lmms-eval with the plug-in: its scores are those of training/evaluate.py, and no failure becomes an empty answer."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from lmms_eval.__main__ import cli_evaluate
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model, list_available_models
from lmms_eval.tasks import TaskManager
from PIL import Image

from tests.lmms_eval import local_task
from toprl_models import FastV
from toprl_models.integrations import lmms_eval_models
from toprl_models.registry import METHODS, method_of
from training.evaluate import EvaluateConfig, evaluate

STAGES = [1, 2, 3]
SAMPLES = 12


class Case(NamedTuple):
    """A model in a folder, and where its samples, task and policy are."""

    plain: str  # the name of the model in lmms-eval
    model: Path
    samples: Path
    tasks: Path
    policy: Path
    num_visual: int
    dtype: str
    arguments: str  # of lmms-eval's model
    full: list[str]  # what the unpruned model answers

    @property
    def pruned(self) -> str:
        return f"toprl_{self.plain}"

    @property
    def budget(self) -> int:
        """A quarter of the visual tokens."""
        return self.num_visual // 4

    @property
    def fastv(self) -> str:
        return f"method=fastv,budget={self.budget},num_visual={self.num_visual}"


def make_case(plain: str, folder: Path) -> Case:
    """References are the unpruned model's own answers: scores tell how often a pruned one agrees."""
    if plain == "llava_hf":
        model, num_visual, size, dtype = local_task.save_llava(folder / "model"), 64, 112, "float32"
        arguments = f"pretrained={model},device_map=cpu"
    else:
        model, num_visual, size, dtype = local_task.save_qwen(folder / "model"), 16, 112, "bfloat16"
        arguments = f"pretrained={model},device_map=cpu,min_pixels=784,max_pixels=12544"
    policy = local_task.save_policy(folder / "policy", model, STAGES)
    unscored = local_task.write_samples(folder / "unscored", ["none"] * SAMPLES, size)
    full = [text for text, _ in our_evaluation(model, unscored, dtype, ["full"], [], [])["full"]]
    samples = local_task.write_samples(folder / "samples", [text or "none" for text in full], size)
    tasks = local_task.write_task(folder / "tasks", samples)
    return Case(plain, model, samples, tasks, policy, num_visual, dtype, arguments, full)


@pytest.fixture(scope="module", params=["llava_hf", "qwen2_5_vl"])
def case(request, tmp_path_factory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Case:
    return make_case("llava_hf", tmp_path_factory.mktemp("llava"))


def our_evaluation(
    model: Path, samples: Path, dtype: str, methods: list[str], policy: list[Path], budget: list[float]
) -> dict[str, list[tuple[str, float]]]:
    """Answers and scores of ``training/evaluate.py`` by method, one sample per batch, as lmms-eval runs LLaVA."""
    folder = samples / "evaluation"
    evaluate(
        EvaluateConfig(
            model_name_or_path=str(model),
            task=["custom"],
            dataset_path=[str(samples)],
            task_option=["custom.metric=exact_match"],
            method=methods,
            policy=list(map(str, policy)),
            budget=budget,
            stages=[] if policy else STAGES,
            batch_size=1,
            dtype=dtype,
            device="cpu",
            output_dir=str(folder),
            overwrite=True,
        )
    )
    found: dict[str, list[tuple[str, float]]] = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["method"], []).append((record["index"], record["prediction"], record["score"]))
    return {method: [(text, score) for _, text, score in sorted(rows)] for method, rows in found.items()}


def lmms_evaluation(
    case: Case, model: Any, arguments: str = "", force_simple: bool = False, limit: int | None = None
) -> dict[str, Any]:
    results = simple_evaluate(
        model=model,
        model_args=",".join(filter(None, [case.arguments, arguments])),
        tasks=[local_task.NAME],
        task_manager=TaskManager("ERROR", str(case.tasks), include_defaults=False),
        batch_size=1,
        device="cpu",
        force_simple=force_simple,
        limit=limit,
        bootstrap_iters=0,
    )
    assert results is not None
    return results


def answers_of(results: dict[str, Any]) -> list[tuple[str, float]]:
    samples = sorted(results["samples"][local_task.NAME], key=lambda sample: sample["doc_id"])
    assert len(samples) == SAMPLES
    return [(sample["filtered_resps"][0].strip(), sample["agreement"]) for sample in samples]


def score_of(results: dict[str, Any]) -> float:
    return results["results"][local_task.NAME]["agreement,none"]


def test_lmms_eval_finds_the_models_by_their_entry_point():
    assert {"toprl_llava_hf", "toprl_qwen2_5_vl"} <= set(list_available_models())
    for name, simple, chat in (
        ("toprl_llava_hf", lmms_eval_models.LlavaHf, lmms_eval_models.LlavaHfChat),
        ("toprl_qwen2_5_vl", lmms_eval_models.Qwen2_5_VL, lmms_eval_models.Qwen2_5_VLChat),
    ):
        # like lmms-eval's own: the chat model unless the simple one is asked for
        assert get_model(name) is chat and get_model(name, force_simple=True) is simple
        plain = name.removeprefix("toprl_")
        assert issubclass(chat, get_model(plain)) and issubclass(simple, get_model(plain, force_simple=True))


@pytest.mark.slow
def test_scores_and_answers_are_those_of_our_evaluation(case):
    ours = our_evaluation(case.model, case.samples, case.dtype, ["fastv", "toprl"], [case.policy], [case.budget])
    learned = f"policy={case.policy},budget={case.budget},num_visual={case.num_visual}"
    for method, arguments in (("fastv", case.fastv), ("toprl", learned)):
        results = lmms_evaluation(case, case.pruned, arguments)
        assert answers_of(results) == ours[method]
        mean = sum(score for _, score in ours[method]) / SAMPLES
        assert score_of(results) == pytest.approx(mean)
        # pruning changes some answers: an evaluation that does not prune would be noticed
        assert [text for text, _ in ours[method]] != case.full and len(set(case.full)) > 1
        assert results["throughput"]["avg_visual_tokens"] == case.num_visual
        assert results["throughput"]["avg_visual_tokens_over_layers"] == pytest.approx(case.budget, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("force_simple", [False, True])
def test_a_budget_of_all_tokens_is_the_plain_model_of_lmms_eval(case, force_simple):
    plain = lmms_evaluation(case, case.plain, force_simple=force_simple)
    everything = f"method=fastv,budget={case.num_visual},num_visual={case.num_visual}"
    pruned = lmms_evaluation(case, case.pruned, everything, force_simple)
    assert answers_of(pruned) == answers_of(plain)
    assert score_of(pruned) == score_of(plain)
    if not force_simple:
        assert [text for text, _ in answers_of(plain)] == case.full
    few = lmms_evaluation(case, case.pruned, case.fastv, force_simple)
    assert answers_of(few) != answers_of(plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [*(name for name in METHODS if "images" in METHODS[name].inputs), "divprune+fastv+toprl"]
)
def test_every_method_meets_its_budget(llava, method):
    learned = f",policy={llava.policy}" if method_of(method).trained else ""
    # 5 x 5: "downsample" takes squares
    results = lmms_evaluation(llava, "toprl_llava_hf", f"method={method},budget=25{learned}", limit=2)
    assert len(results["samples"][local_task.NAME]) == 2
    assert results["throughput"]["avg_visual_tokens_over_layers"] == pytest.approx(25, abs=1)


@pytest.mark.slow
@pytest.mark.parametrize("force_simple", [False, True])
def test_an_exception_inside_a_generation_surfaces(case, force_simple, monkeypatch):
    def broken(self, context):
        raise RuntimeError("the score is broken")

    monkeypatch.setattr(FastV, "score", broken)
    with pytest.raises(RuntimeError, match="the score is broken"):
        lmms_evaluation(case, case.pruned, case.fastv, force_simple)


@pytest.mark.slow
def test_in_process_and_what_lmms_eval_frees(llava):
    arguments = f"{llava.arguments},{llava.fastv}"
    model = get_model("toprl_llava_hf").create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})
    weights = weakref.ref(model.model)
    results = lmms_evaluation(llava, model)
    assert score_of(results) == score_of(lmms_evaluation(llava, "toprl_llava_hf", llava.fastv))
    # lmms-eval drops its model after an evaluation, to make room for a judge: the pruner must not hold it
    assert weights() is None


ANSWERS = ("left", "three blue five")


def likelihood_requests(case: Case, model: Any) -> list[Any]:
    """Each of three questions with each of ANSWERS, as lmms-eval asks them."""
    docs = [json.loads(line) for line in (case.samples / "test.jsonl").read_text().splitlines()[:3]]
    model.task_dict[local_task.NAME] = {"test": docs}

    def images(doc: dict[str, str]) -> list[Image.Image]:
        return [Image.open(doc["image"]).convert("RGB")]

    arguments = [(doc["question"], answer, images, i) for i, doc in enumerate(docs) for answer in ANSWERS]
    return [SimpleNamespace(args=(*each, local_task.NAME, "test")) for each in arguments]


def llava_model(case: Case, arguments: str, force_simple: bool = False) -> Any:
    plugin = get_model("toprl_llava_hf", force_simple=force_simple)
    return plugin.create_from_arg_string(f"{case.arguments},{arguments}", {"batch_size": 1, "device": "cpu"})


@pytest.mark.slow
@pytest.mark.parametrize("force_simple", [False, True])
def test_loglikelihood(llava, force_simple):
    """At keep-all that of the unattached model; labels are the answer and nothing else."""
    model = llava_model(llava, "method=fastv,budget=64", force_simple)
    requests = likelihood_requests(llava, model)
    called = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: called.append(kwargs), with_kwargs=True)
    answers = model.loglikelihood(requests)
    for kwargs, request in zip(called, requests, strict=True):
        wanted = request.args[1].split()
        labels = kwargs["labels"][0]
        assert model.tokenizer.decode(labels[labels != -100]).split()[: len(wanted)] == wanted
        assert (kwargs["input_ids"] == model.model.config.image_token_id).sum() == 64
    with model.pruner.disabled():
        assert model.loglikelihood(requests) == answers
    losses = [loss for loss, _ in answers]
    assert len(set(losses)) == len(losses)
    assert type(model._image_processor).__name__ == "LlavaProcessor"  # lmms-eval's own again
    model.clean()
    few = llava_model(llava, "method=fastv,budget=16", force_simple)
    pruned = few.loglikelihood(likelihood_requests(llava, few))
    assert all(abs(loss - other) > 1e-4 for (loss, _), other in zip(pruned, losses, strict=True))


@pytest.mark.slow
def test_no_method_sees_the_answer(llava):
    """Two answers to a question leave the same visual tokens; FastV scores by the last token that it is shown."""
    model = llava_model(llava, "method=fastv,budget=16")
    scores = []
    for request in likelihood_requests(llava, model):
        model.loglikelihood([request])
        scores.append(model.pruner.trace[0].scores)
    for first, second in zip(scores[::2], scores[1::2], strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    assert (scores[0] - scores[2]).abs().max() > 1e-4  # and another question leaves others


@pytest.mark.slow
def test_generate_is_what_it_was(llava):
    """While lmms-eval generates, the model's generate is watched; whatever was set on the instance comes back."""
    model = llava_model(llava, llava.fastv)
    plain = vars(model.model).get("generate")
    model.generate_until([])
    assert vars(model.model).get("generate") is plain
    model.model.generate = earlier = model.model.generate
    model.generate_until([])
    assert vars(model.model)["generate"] is earlier


@pytest.mark.slow
def test_command_line(llava, tmp_path, monkeypatch):
    command = f"lmms_eval --model toprl_llava_hf --model_args {llava.arguments},policy={llava.policy},budget=16 "
    command += f"--tasks {local_task.NAME} --include_path {llava.tasks} --batch_size 1 --device cpu "
    command += f"--output_path {tmp_path} --log_samples"
    monkeypatch.setattr(sys, "argv", command.split())
    cli_evaluate()
    (written,) = tmp_path.glob("**/*_results.json")
    results = json.loads(written.read_text())
    ours = our_evaluation(llava.model, llava.samples, llava.dtype, ["toprl"], [llava.policy], [16])["toprl"]
    assert score_of(results) == pytest.approx(sum(score for _, score in ours) / SAMPLES)
    assert f"policy={llava.policy},budget=16" in str(results["config"]["model_args"])
    assert results["throughput"]["avg_visual_tokens_over_layers"] == pytest.approx(16, abs=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("method=fastvv,budget=16", "method=fastvv: .*known methods: toprl, fastv"),
        ("method=fastv", "budget is missing"),
        ("method=fastv,budget=3", "budget=3.*between .* and 64"),
        ("method=fastv,budget=16,stages=2:9", "stage at layer 9"),
        ("policy=no/such/folder,budget=16", "policy=no/such/folder: give a folder"),
        ("policy={policy},budget=16,stages=1:2", "stages at layers"),
    ],
)
def test_wrong_arguments_are_told_before_the_model_is_loaded(llava, arguments, message, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "from_pretrained", load)
    with pytest.raises(ValueError, match=message):
        lmms_evaluation(llava, "toprl_llava_hf", arguments.format(policy=llava.policy))


@pytest.mark.parametrize("case", ["qwen2_5_vl"], indirect=True)
def test_images_of_different_sizes_need_the_number_that_the_budget_is_out_of(case):
    with pytest.raises(ValueError, match=r"budget=8: .* qwen2_5_vl .* num_visual=576"):
        lmms_evaluation(case, case.pruned, "method=fastv,budget=8")
