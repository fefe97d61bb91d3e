"""The evaluation: methods, budgets, true token counts, what the script writes, what it refuses."""

from __future__ import annotations

import json
import types

import pytest
import torch

from tests.models.tiny_families import FAMILY_NAMES, build_inputs, build_model, visual_mask
from tests.training import tables
from tests.training.evaluation_helpers import KEPT, LAYERS, config_of, read_samples, save_policy
from toprl_kernels import flops
from toprl_models import Schedule, StageContext, TopRLPolicy, attach, tiny
from toprl_models.families import count_visual
from training import cli
from training.evaluate import EvaluateConfig, evaluate, main, make_tasks
from training.evaluation import runner as runner_module
from training.evaluation.measure import answer_timed
from training.evaluation.methods import METHODS, RandomBySample, load_policies, make_method, policies_for
from training.evaluation.records import Store
from training.evaluation.results import level_of, summarise
from training.evaluation.runner import Ranks, Runner
from training.tasks import Sample, encode, exact_match, make_task

AVERAGE = (64 + 8 + 4 + 3 * 2) / 6  # tokens over the six layers of the tiny model
OWN_METHOD = """
from toprl_models import Policy
class Brightest(Policy):
    def score(self, context):
        return context.hidden_states.norm(dim=-1)
"""
PRUNED = ("toprl", "fastv", "fastv_progressive", "pyramiddrop", "random", "untrained")


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy") / "policy")


@pytest.fixture(scope="module")
def every_method(policy_folder, tmp_path_factory):
    """The files of ``python training/evaluate.py --policy FOLDER --keep 8 4 2 --limit 24``."""
    folder = tmp_path_factory.mktemp("every_method")
    main(EvaluateConfig(policy=[policy_folder], keep=KEPT, limit=24, seeds=[0, 1], output_dir=str(folder)))
    return folder


def test_every_method(every_method):
    results = json.loads((every_method / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == [n for n, row in METHODS.items() if row.default] == ["full", *PRUNED, "argmax"]
    assert rows["full"]["average_tokens"] == 64
    assert rows["full"]["retention"] == 1 and rows["full"]["p"] == 1
    for name in PRUNED:
        assert rows[name]["average_tokens"] == pytest.approx(14 if name == "fastv" else AVERAGE)
        assert rows[name]["runs"] == (2 if name in ("random", "untrained") else 1)
        # keys and values of 64 visual and 9 text tokens: 13.7 of 64 are left
        assert rows[name]["kv_bytes"] < 0.4 * rows["full"]["kv_bytes"]
        assert rows[name]["prefill_seconds"] > 0 and rows[name]["decode_seconds"] > 0
    assert rows["argmax"]["budget"] == "free"
    # two tokens chosen at random: the model cannot do as well as with all of them
    assert rows["full"]["score"] > rows["random"]["score"] + 0.3
    assert rows["random"]["difference_interval"][1] < 0 and rows["random"]["p"] < 0.001
    assert results["tasks"]["ocr"]["dataset"] == "embedded scenes" and results["tasks"]["ocr"]["n"] == 24
    schedules = results["schedules"]["ocr"]["8/4/2"]
    assert list(schedules) == list(PRUNED)
    assert schedules["toprl"]["average_tokens"] == pytest.approx(AVERAGE)
    assert schedules["toprl"]["keep"] == KEPT and schedules["toprl"]["layers"] == LAYERS
    # FastV prunes once: what is left of the budget when its first layer has seen all tokens
    assert schedules["fastv"]["layers"] == [1] and schedules["fastv"]["keep"] == [4]


def test_macs_are_those_of_the_schedule_and_the_actor(every_method):
    rows = {row["method"]: row for row in json.loads((every_method / "results.json").read_text())["rows"]}
    text = tiny.load()[0].config.get_text_config()
    schedule = Schedule(tuple(zip(LAYERS, KEPT, strict=True)))
    assert rows["pyramiddrop"]["macs"] == pytest.approx(schedule.macs(64, text))
    # the actor (width 16) reads 64, 8 and 4 tokens
    assert rows["toprl"]["macs"] - rows["pyramiddrop"]["macs"] == pytest.approx(flops.actor_macs(76, 128, 16))
    assert rows["full"]["macs"] == pytest.approx(6 * flops.layer_macs(64, 128, text.intermediate_size))
    facts = json.loads((every_method / "results.json").read_text())["schedules"]["ocr"]["8/4/2"]["toprl"]
    assert facts["macs_ratio"] == pytest.approx(rows["pyramiddrop"]["macs_ratio"]) and 0 < facts["macs_ratio"] < 0.3
    assert rows["full"]["tflops"] == pytest.approx(2 * rows["full"]["macs"] / 1e12)


def test_every_answer_is_written(every_method):
    records = read_samples(every_method)
    assert len(records) == 24 * (1 + 1 + 1 + 1 + 1 + 2 + 2 + 1)
    first = records[0]
    assert (first["task"], first["method"], first["budget"], first["seed"]) == ("ocr", "full", "full", 0)
    assert first["kept"] == [] and first["num_visual"] == 64
    fastv = [record for record in records if record["method"] == "fastv"]
    assert [record["index"] for record in fastv] == list(range(24))
    assert {tuple(record["kept"]) for record in fastv} == {(4,)}
    assert {tuple(record["kept"]) for record in records if record["method"] == "pyramiddrop"} == {tuple(KEPT)}
    for record in fastv:
        assert record["score"] == exact_match(record["prediction"], record["reference"])
        assert record["question"] == "which digit is in the picture ?"
    assert len({record["key"] for record in fastv}) == 24
    assert sorted(path.name for path in every_method.iterdir() if path.name[0] != ".") == [
        "results.json",
        "samples.jsonl",
        "settings.json",
        "table.html",
        "table.md",
    ]


def test_a_finished_evaluation_is_not_run_again(every_method, policy_folder, monkeypatch, capsys):
    before = (every_method / "samples.jsonl").read_bytes()
    monkeypatch.setattr(runner_module, "answer_timed", lambda *_: pytest.fail("an answer was computed again"))
    main(EvaluateConfig(policy=[policy_folder], keep=KEPT, limit=24, seeds=[0, 1], output_dir=str(every_method)))
    assert (every_method / "samples.jsonl").read_bytes() == before
    output = capsys.readouterr().out
    assert "resumed: 240 answers are there already" in output and "Keep 8/4/2 tokens" in output


def test_answers_are_those_of_the_plain_loop(every_method):
    """A method's records against generate() with the policy attached, all samples in one batch."""
    model, processor = tiny.load()
    task = make_task("ocr", "test", 24)
    samples = [task[i] for i in range(24)]
    inputs = encode(processor, task, samples, "cpu")
    schedule = Schedule(tuple(zip(LAYERS, KEPT, strict=True)))
    with attach(model, make_method("pyramiddrop", model), schedule=schedule):
        output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    expected = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    records = [record for record in read_samples(every_method) if record["method"] == "pyramiddrop"]
    assert [record["prediction"] for record in records] == [text.strip() for text in expected]
    assert len(set(expected)) > 3


def test_several_tasks_and_budgets(tmp_path):
    results = evaluate(config_of(tmp_path, task=["ocr", "shape"], keep=[], budget=[32, 14.5], limit=8))
    assert [(one["method"], one["budget"]) for one in results["averages"]] == [
        ("full", "full"),
        ("fastv", "32"),
        ("fastv", "14.5"),
        ("random", "32"),
        ("random", "14.5"),
    ]
    for one in results["averages"][1:]:
        assert one["average_tokens"] == pytest.approx(float(one["budget"]), abs=0.5)
    for one in results["rows"]:
        keep = results["schedules"][one["task"]].get(one["budget"], {}).get("keep")
        assert keep is None or len(keep) == 3
    table = (tmp_path / "table.md").read_text()
    assert table.index("Retain average 32 tokens") < table.index("Retain average 14.5 tokens")


def test_dtype(policy_folder, every_method, tmp_path):
    given = {"policy": [policy_folder], "method": ["toprl", "argmax"], "stages": [], "limit": 4}
    half = {row["method"]: row for row in evaluate(config_of(tmp_path, dtype="bfloat16", **given))["rows"]}
    whole = {row["method"]: row for row in json.loads((every_method / "results.json").read_text())["rows"]}
    assert half["full"]["kv_bytes"] == whole["full"]["kv_bytes"] / 2
    assert half["toprl"]["kv_bytes"] == whole["toprl"]["kv_bytes"] / 2
    assert half["full"]["score"] > 0.5


def test_benchmarks_from_local_files(tmp_path):
    """Corpus metrics and their facts; the headline of POPE, F1, is not the mean of its scores."""
    for name, split in (("pope", "test"), ("textvqa", "validation")):
        tables.write_benchmark(tmp_path / name, name, split)
    given = [f"{name}={tmp_path / name}" for name in ("textvqa", "pope")]
    options = ["textvqa.ocr_hints=true"]
    config = config_of(tmp_path / "out", task=["textvqa", "pope"], dataset_path=given, task_option=options, limit=2)
    results = evaluate(config)
    textvqa, pope = results["tasks"]["textvqa"], results["tasks"]["pope"]
    assert textvqa["ocr_hints"] is True and textvqa["rows"] == 3 and textvqa["n"] == 2
    assert (textvqa["headline"], pope["headline"]) == ("vqa_accuracy", "f1")
    assert (textvqa["level"], pope["level"]) == ("perception", "perception")
    assert {"f1", "yes_ratio"} <= set(results["runs"][-1]["corpus"])
    questions = {record["question"] for record in read_samples(tmp_path / "out") if record["task"] == "textvqa"}
    assert questions == {"what colour is it?"}
    references = [record["reference"] for record in read_samples(tmp_path / "out") if record["task"] == "textvqa"]
    assert references[0] == tables.ANSWERS


def test_policies_go_to_the_tasks_they_were_trained_on(tmp_path):
    names = [save_policy(tmp_path / name, name.rstrip("2"), seed) for seed, name in enumerate(["ocr", "shape", "ocr2"])]
    policies = load_policies(names)
    assert [one.name for one in policies_for("ocr", policies)] == [names[0], names[2]]
    assert [one.name for one in policies_for("shape", policies)] == [names[1]]
    assert policies_for("count", policies) == policies  # transfer: all of them
    assert len({one.digest for one in policies}) == 3
    config = config_of(tmp_path / "out", task=[], method=["toprl"], policy=names, stages=[], limit=4)
    runs = [(run["task"], run["policy"]) for run in evaluate(config)["runs"] if run["method"] == "toprl"]
    assert runs == [("ocr", names[0]), ("ocr", names[2]), ("shape", names[1])]


def test_random_pruning_does_not_depend_on_the_batch():
    def context(num_visual: tuple[int, ...]) -> StageContext:
        index = torch.arange(max(num_visual)).expand(len(num_visual), -1)
        valid = index < torch.tensor(num_visual)[:, None]
        index = torch.where(valid, index, -1)
        state = torch.zeros(len(num_visual), max(num_visual), 4)
        nothing = {name: None for name in ("last_attention", "text_attention", "prompt", "inputs")}
        return StageContext(1, 2, state, valid, index, num_visual, num_visual, state[:, 0], **nothing)

    policy = RandomBySample(seed=3)
    policy.keys = ["a", "b"]
    together = policy.score(context((6, 9)))
    policy.keys = ["a"]
    assert torch.equal(policy.score(context((6,)))[0], together[0, :6])
    assert together[0, :6].unique().numel() == 6
    assert not torch.equal(together[0, :6], together[1, :6])
    other = RandomBySample(seed=4)
    other.keys = ["a", "b"]
    assert not torch.equal(other.score(context((6, 9))), together)


def test_untrained_actors_differ_by_seed_and_leave_the_global_seed_alone(policy_folder):
    model, _ = tiny.load()
    policy = TopRLPolicy.from_pretrained(policy_folder)
    torch.manual_seed(5)
    first, second = (make_method("untrained", model, seed=seed, policy=policy) for seed in (0, 1))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert not torch.equal(first.fc1.weight, second.fc1.weight)
    again = make_method("untrained", model, seed=0, policy=policy)
    assert torch.equal(first.fc1.weight, again.fc1.weight)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_visual_tokens_of_every_family(family):
    model = build_model(family)
    inputs = build_inputs(family, (("image",), (), ("image",)))
    counts = count_visual(model, inputs)
    assert counts == visual_mask(inputs).sum(1).tolist()
    assert counts[0] > 0 and counts[1] == 0
    inputs["attention_mask"][2] = 0
    assert count_visual(model, inputs)[2] == 0


class StubTask:
    """Three prompts of a LLaVA-NeXT, each with another number of visual tokens."""

    name, max_new_tokens = "ocr", 2

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        return make_task("ocr", "test", 3)[index]

    def score(self, prediction: str, sample: Sample) -> float:
        return float(prediction == "4")

    def corpus(self, predictions, samples):
        return {"accuracy": sum(self.score(p, s) for p, s in zip(predictions, samples, strict=True)) / 3}

    def describe(self):
        return {"task": "ocr"}


def test_samples_with_different_numbers_of_visual_tokens(tmp_path, monkeypatch):
    """The budget holds on average over the samples; counts and costs are each sample's own."""
    model = build_model("llava_next")
    inputs = build_inputs("llava_next", (("image",),) * 3)
    visual = visual_mask(inputs).sum(1).tolist()
    assert len(set(visual)) == 3
    monkeypatch.setattr(runner_module, "encode", lambda *_: inputs)
    processor = types.SimpleNamespace(batch_decode=lambda ids, **_: [str(len(row)) for row in ids])
    config = config_of(tmp_path, method=["fastv"], keep=[], budget=[20], seeds=[0])
    runner = Runner(config, model, processor, {"ocr": StubTask()}, [], batch_size=3)
    store = Store(tmp_path)
    store.open({})
    runner.run(store, Ranks(), lambda *_: None)
    found = store.merge(runner.all_cells())
    store.close()
    pruned = [record for records in found.values() for record in records.values() if record["kept"]]
    assert [record["num_visual"] for record in pruned] == visual
    assert len({tuple(record["kept"]) for record in pruned}) == 3
    row = summarise(found, runner)["rows"][1]
    assert row["average_tokens"] == pytest.approx(20, abs=0.5)


def test_prefill_ends_with_the_first_forward_pass(monkeypatch):
    model, processor = tiny.load()
    task = make_task("ocr", "test", 2)
    samples = [task[0], task[1]]
    inputs = encode(processor, task, samples, "cpu")
    clock = iter(range(100))
    monkeypatch.setattr("training.evaluation.measure.time.perf_counter", lambda: float(next(clock)))
    answers = answer_timed(model, processor, task, samples, inputs)
    assert (answers.prefill_seconds, answers.decode_seconds) == (0.5, 0.5)  # three readings, two samples
    length = inputs["input_ids"].shape[1]
    assert answers.kv_bytes == 6 * 2 * 128 * 4 * length  # layers, keys and values, width, float32


def test_levels():
    assert [level_of(task) for task in ("pope", "gqa", "msvd_qa", "ocr", "custom")] == [
        "perception",
        "reasoning",
        "video",
        "both",
        "any",
    ]


def test_the_default_folder_is_named_after_what_is_run(policy_folder):
    keep = EvaluateConfig(policy=[policy_folder], keep=KEPT).folder(["ocr", "shape"])
    assert keep.name == "evaluation_ocr-shape_8-4-2" and keep.parent.samefile(policy_folder + "/..")
    assert str(EvaluateConfig(budget=[192, 14.5]).folder(["gqa"])) == "runs/evaluation_gqa_192_14.5"


def test_options_of_tasks():
    config = EvaluateConfig(
        keep=[4],
        dataset_path=["gqa=data/GQA", "textvqa=data/a=b"],
        task_option=["textvqa.ocr_hints=true", "gqa.split=val", "gqa.num_frames=4"],
    )
    assert config.task_arguments("textvqa", ["gqa", "textvqa"]) == {"dataset_path": "data/a=b", "ocr_hints": True}
    assert config.task_arguments("gqa", ["gqa", "textvqa"]) == {
        "dataset_path": "data/GQA",
        "split": "val",
        "num_frames": 4,
    }
    assert EvaluateConfig(keep=[4], dataset_path=["data/x=y"]).task_arguments("gqa", ["gqa"]) == {
        "dataset_path": "data/x=y"
    }


def test_flags_from_the_command_line_and_from_a_file(tmp_path):
    text = "--task textvqa gqa --method fastv --budget 192 64 --stages 2 8 16 --seeds 0 1 --overwrite"
    flags = cli.parse(EvaluateConfig, "", text.split())
    assert (flags.task, flags.budget, flags.stages, flags.seeds) == (["textvqa", "gqa"], [192, 64], [2, 8, 16], [0, 1])
    assert flags.overwrite and flags.budgets() == ["192", "64"] and flags.methods() == ["full", "fastv"]
    file = tmp_path / "table1.yaml"
    file.write_text("task: [textvqa, gqa]\nmethod: [fastv]\nbudget: [192, 64]\nstages: [2, 8, 16]\noverwrite: true\n")
    given = cli.parse(EvaluateConfig, "", [str(file)])
    assert (given.task, given.budgets(), given.stages, given.overwrite) == (flags.task, ["192", "64"], [2, 8, 16], True)
    with pytest.raises(ValueError, match="slowv"):
        cli.parse(EvaluateConfig, "", ["--method", "slowv", "--keep", "4"])


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": ["fastv", "slowv"]},
            "--method slowv: method 'slowv' is unknown; known methods: toprl, .* full, untrained, argmax",
        ),
        ({"method": ["toprl"]}, "--method toprl needs --policy"),
        ({"keep": []}, "either --keep"),
        ({"budget": [16]}, "either --keep"),
        ({"seeds": []}, "--seeds is empty"),
        ({"seeds": [1, 1]}, "--seeds 1 1: a value is given twice"),
        ({"limit": -1}, "--limit -1"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"task": ["ocrs"]}, "ocr, shape, colour"),
        ({"task": []}, "--task is needed"),
        ({"keep": [8, 4]}, "3 numbers are needed"),
        ({"stages": [1, 2, 6]}, "--stages 1 2 6: the model has 6 layers"),
        ({"keep": [], "budget": [5]}, "ocr, fastv: average_tokens=5.0 is impossible .* lies between 10.6667 and 64"),
        ({"policy": ["runs/no/policy"]}, "--policy runs/no/policy: no such folder"),
        ({"dataset_path": ["data"], "task": ["ocr", "shape"]}, "TASK=PATH, TASK one of ocr, shape"),
        ({"dataset_path": ["data"]}, "ocr: dataset_path='data' has no meaning"),
        ({"task_option": ["ocr_hints=1"]}, "must be TASK.OPTION=VALUE"),
        ({"task_option": ["ocr.colour=1"]}, "ocr.colour: no such option; known: split, dataset_path"),
    ],
)
def test_flags_that_do_not_fit(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate(config_of(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_policies_that_do_not_fit(policy_folder, tmp_path):
    other = save_policy(tmp_path / "other", layers=[2, 4])
    with pytest.raises(ValueError, match="different stage layers"):
        load_policies([policy_folder, other])
    with pytest.raises(ValueError, match="trained for \\(1, 2, 3\\); leave --stages out"):
        evaluate(config_of(tmp_path / "out", policy=[policy_folder], stages=[1, 2, 4]))
    nameless = save_policy(tmp_path / "nameless", task=None)
    with pytest.raises(ValueError, match="--task is needed"):
        evaluate(EvaluateConfig(policy=[nameless], keep=KEPT))
    model, _ = tiny.load()
    with pytest.raises(ValueError, match="needs a trained policy"):
        make_method("argmax", model)
    with pytest.raises(ValueError, match="'nothing' is unknown"):
        make_method("nothing", model)


def test_scenes_have_a_size_of_their_own():
    assert len(make_tasks(EvaluateConfig(keep=[4]), ["ocr"])["ocr"]) == 512
    assert len(make_tasks(EvaluateConfig(keep=[4], limit=7), ["ocr"])["ocr"]) == 7


def test_unknown_task_lists_the_known():
    with pytest.raises(ValueError, match="ocr, shape, colour"):
        make_task("ocrs", "test", 4)
    with pytest.raises(ValueError, match="split='dev'"):
        make_task("ocr", "dev", 4)


def test_exact_match():
    assert exact_match(" Yes. ", "yes") == 1.0
    assert exact_match("yes", "no") == 0.0
    assert exact_match("", "no") == 0.0


def test_encode_pads_on_the_left():
    _, processor = tiny.load()
    task = make_task("mixed", "train", 6)
    inputs = encode(processor, task, [task[i] for i in range(6)], "cpu")
    mask = inputs["attention_mask"]
    assert (mask[:, -1] == 1).all()
    assert (mask.diff(dim=1) >= 0).all()
    assert ((inputs["input_ids"] == processor.image_token_id).sum(1) == tiny.NUM_VISUAL_TOKENS).all()


def test_all_methods_at_one_budget(policy_folder, tmp_path):
    names = [name for name, row in METHODS.items() if row.method and row.scheduled and "images" in row.method.inputs]
    config = config_of(
        tmp_path, method=names, policy=[policy_folder], stages=[], keep=[], budget=[32], limit=4, seeds=[0]
    )
    results = evaluate(config)
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["full", *names] and len(names) == 22
    for name in names:
        # 25 tokens are the largest whole image within the budget; counts are whole numbers
        assert rows[name]["average_tokens"] == pytest.approx(25 if name == "downsample" else 32, abs=1), name
        assert rows[name]["kv_bytes"] < rows["full"]["kv_bytes"]
    plans = results["schedules"]["ocr"]["32"]
    assert plans["visionzip"]["layers"] == [0] and plans["visionzip"]["keep"] == [32]
    assert plans["fastv"]["layers"] == [1] and plans["sparsevlm"]["layers"] == [1, 2, 3]
    # methods of several stages prune where the policy does
    assert plans["random"]["layers"] == plans["fastv_progressive"]["layers"] == LAYERS
    records = {record["method"]: record for record in read_samples(tmp_path)}
    assert len(records["sparsevlm"]["kept"]) == 3 and records["visionzip"]["kept"] == [32]
    assert "Smaller image: 0" in (tmp_path / "table.md").read_text()


def test_compositions_and_classes_in_files(policy_folder, tmp_path):
    """Each is a row of the table, at the same budget as the others, and a file that changed is another setting."""
    (tmp_path / "my_file.py").write_text(OWN_METHOD)
    names = ["divprune+fastv", "random+toprl", f"{tmp_path}/my_file.py:Brightest"]
    given = {"policy": [policy_folder], "stages": [], "keep": [], "budget": [24], "limit": 4, "seeds": [0, 1]}
    config = config_of(tmp_path / "out", method=[*names, "fastv"], **given)
    assert config.methods() == ["full", "fastv", *names]
    results = evaluate(config)
    rows = {row["method"]: row for row in results["rows"]}
    for name in (*names, "fastv"):
        assert rows[name]["average_tokens"] == pytest.approx(24, abs=1), name
    assert rows["random+toprl"]["runs"] == 2 and rows["divprune+fastv"]["runs"] == 1  # random draws
    plans = results["schedules"]["ocr"]["24"]
    assert plans["divprune+fastv"]["layers"] == [0, 1] and plans["random+toprl"]["layers"] == [1, 2]
    assert plans[names[2]]["layers"] == LAYERS
    table = (tmp_path / "out" / "table.md").read_text()
    assert "DivPrune + FastV: 0, 1" in table and "| Brightest |" in table
    assert f"{tmp_path}/my_file.py" in results["settings"]["code"]
    (tmp_path / "my_file.py").write_text(OWN_METHOD + "# changed\n")
    with pytest.raises(ValueError, match=r"code\..*my_file\.py: was"):
        evaluate(config)


def test_random_pruning_in_a_composition_draws_by_sample(tmp_path):
    given = {"method": ["divprune+random"], "keep": [], "budget": [24], "limit": 4, "seeds": [0]}
    kept = []
    for size in (1, 4):
        evaluate(config_of(tmp_path / str(size), batch_size=size, **given))
        kept.append([row["prediction"] for row in read_samples(tmp_path / str(size))])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("stages", [[1, 2, 9], [3, 2]])
def test_stages_are_checked_before_data_are_read(stages, tmp_path, monkeypatch):
    monkeypatch.setattr("training.evaluate.make_task", lambda *_, **__: pytest.fail("data were read"))
    asked = " ".join(map(str, stages))
    with pytest.raises(ValueError, match=f"--stages {asked}: the model has 6 layers, so stages .* from 0 to 5"):
        evaluate(config_of(tmp_path, stages=stages, keep=[8] * len(stages)))


def test_a_method_that_does_not_fit_the_model_is_refused_at_once(tmp_path, monkeypatch):
    model = build_model("llava")
    model.config.vision_feature_select_strategy = "full"
    monkeypatch.setattr("training.evaluate.load_model", lambda *_: (model, None))
    with pytest.raises(ValueError, match=r"--method visionzip: .*vision_feature_select_strategy='full' must be"):
        evaluate(config_of(tmp_path / "out", method=["visionzip"], stages=[], keep=[], budget=[32]))
    assert not (tmp_path / "out").exists()
