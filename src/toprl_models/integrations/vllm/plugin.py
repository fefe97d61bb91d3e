"""The hook into vLLM: when a configuration is made with our options, its model becomes the pruned variant."""

from __future__ import annotations

import copy
import functools
from dataclasses import asdict
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.logger import init_logger

from toprl_models.integrations.vllm.options import (
    ARCHITECTURES,
    KEY,
    PREFIX,
    PruningOptions,
    check_version,
    is_tested,
    options_of,
)
from toprl_models.methods._tower import TowerPolicy
from toprl_models.policy import Policy

logger = init_logger("vllm.toprl")
MODELS = "toprl_models.integrations.vllm.models"


def register() -> None:
    """Register the pruned classes under names of their own, and read every configuration; safe to call again."""
    if is_tested(vllm.__version__):
        from vllm.model_executor.models.registry import ModelRegistry

        for name in ARCHITECTURES:
            if PREFIX + name not in ModelRegistry.models:
                ModelRegistry.register_model(PREFIX + name, f"{MODELS}:{PREFIX}{name}")
    verify = VllmConfig.try_verify_and_update_config
    if hasattr(verify, KEY):
        return

    # the one place that sees the options and any model, before anything depends on the class
    @functools.wraps(verify)
    def verify_and_prune(self: VllmConfig) -> None:
        config = self.model_config
        first = config is not None and not getattr(config, "config_updated", False)
        verify(self)
        options = options_of(self.additional_config) if first else None
        if options is not None:
            check_version(vllm.__version__)
            configure(self, options)

    setattr(verify_and_prune, KEY, True)
    VllmConfig.try_verify_and_update_config = verify_and_prune


def configure(vllm_config: VllmConfig, options: PruningOptions) -> None:
    """Replace the model's class by its pruned variant.

    Raises:
        ValueError: a model or setting of vLLM that cannot be pruned.
    """
    from vllm.transformers_utils.config import uses_mrope

    model = vllm_config.model_config
    name, config = model.architecture, model.hf_config
    if name not in ARCHITECTURES or getattr(config.vision_config, "model_type", "") == "pixtral":
        raise ValueError(
            f"{KEY}: {name} ({model.model}) cannot be pruned in vLLM; classes that can: {', '.join(ARCHITECTURES)} "
            "(LLaVA with a CLIP or SigLIP tower)"
        )
    policy = options.prepare(copy.deepcopy(config))
    plain = not uses_mrope(config)
    original = not plain or policy.positions == "original"
    refuse(vllm_config, policy, original)
    if plain and original:
        # vLLM's runner numbers by the model's get_mrope_input_positions() where it finds sections
        config.rope_parameters = {"rope_type": "default", "mrope_section": [1, 1, 1]}
    config.toprl = {**asdict(options), "digest": options.digest, "plain": plain, "original": original}
    config.architectures = [PREFIX + name]
    model._model_info, model._architecture = model.registry.inspect_model_cls(config.architectures, model)
    kept = f"{options.keep:.1%}" if isinstance(options.keep, float) else f"{options.keep} tokens"
    logger.info("toprl: %s keeps %s of every image of %s (%s)", options.method, kept, name, options.digest)


def refuse(vllm_config: VllmConfig, policy: Policy, original: bool) -> None:
    """Refuse settings of vLLM that would give other numbers; ``original``: survivors keep their positions."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    multimodal, lora = model.multimodal_config, vllm_config.lora_config
    inner = getattr(policy, "policy", policy)
    reads_tower = isinstance(inner, TowerPolicy)
    shards_tower = parallel.tensor_parallel_size > 1
    wrong: dict[str, Any] = {
        "--runner pooling": model.runner_type != "generate",
        "--enable-mm-embeds (features from outside)": multimodal.enable_mm_embeds,
        "--video-pruning-rate": multimodal.video_pruning_rate,
        "cudagraph_mm_encoder": vllm_config.compilation_config.cudagraph_mm_encoder,
        "enable_tower_connector_lora": lora is not None and lora.enable_tower_connector_lora,
        "--tensor-parallel-size above 1 (the class token's attention is split)": reads_tower and shards_tower,
        "--pipeline-parallel-size above 1 (positions)": original and parallel.pipeline_parallel_size > 1,
        "--speculative-config (positions)": original and vllm_config.speculative_config is not None,
    }
    if found := [setting for setting, is_set in wrong.items() if is_set]:
        raise ValueError(f"{KEY}: {type(policy).__name__} cannot run with {'; '.join(found)}: leave it out")
