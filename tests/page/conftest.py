"""Need gradio and playwright: ``make test-page`` runs them with both in front; nothing is collected elsewhere."""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("gradio") is None or importlib.util.find_spec("playwright") is None:
    collect_ignore_glob = ["test_browser.py"]
else:
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
