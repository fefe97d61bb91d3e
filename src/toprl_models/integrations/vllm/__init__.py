"""The plug-in for vLLM: prune the visual tokens of every image before the language model (docs/serve.md).

vllm serve MODEL --additional-config '{"toprl": {"method": "divprune", "keep": 0.25}}'

vLLM calls ``register`` in each of its processes, by the entry point group ``vllm.general_plugins``. Nothing changes for
a model without these options. ``options.py`` and ``placeholders.py`` need no vLLM.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM about the pruned classes, and read the options when a configuration is made."""
    from toprl_models.integrations.vllm import plugin

    plugin.register()
