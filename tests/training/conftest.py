"""Nothing is downloaded, and nothing is left in the user's cache."""

from __future__ import annotations

import json

import huggingface_hub
import pytest

from training.tasks import make_task

try:
    import datasets
except ImportError:  # without the eval extra the tests of the data sets fail, those of training need not
    datasets = None


@pytest.fixture(autouse=True, scope="session")
def _own_cache_and_no_network(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        if datasets:
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
            patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture
def own_data(tmp_path):
    """Scenes as anyone's JSONL file."""
    task, rows = make_task("ocr", "train", 24), []
    for i in range(len(task)):
        task[i].image.save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": task[i].question, "answer": task[i].answer})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "train.jsonl")
