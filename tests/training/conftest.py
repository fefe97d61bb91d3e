"""Nothing is downloaded, and nothing is left in the user's cache."""

from __future__ import annotations

import huggingface_hub
import pytest

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
