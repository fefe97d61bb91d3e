"""The hook into vLLM: when a configuration is made with our options, its model becomes the pruned variant."""

from __future__ import annotations

import copy
import functools
from dataclasses import asdict
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.logger import init_logger

from toprl_models.integrations.vllm import frontend
from toprl_models.integrations.vllm.options import (
    ARCHITECTURES,
    INSIDE,
    KEY,
    NOT_INSIDE,
    PREFIX,
    PruningOptions,
    check_version,
    is_tested,
    options_of,
)
from toprl_models.methods._tower import TowerPolicy
from toprl_models.policy import Policy

logger = init_logger("vllm.toprl")
PACKAGE = "toprl_models.integrations.vllm"
MODELS = f"{PACKAGE}.models"


def register() -> None:
    """Register the pruned classes under names of their own, and read every configuration; safe to call again."""
    if is_tested(vllm.__version__):
        from vllm.model_executor.models.registry import ModelRegistry

        for name in (prefix + name for prefix in (PREFIX, INSIDE) for name in ARCHITECTURES):
            if name not in ModelRegistry.models:
                ModelRegistry.register_model(name, f"{MODELS}:{name}")
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
            frontend.hook()

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
    plain, inside = not uses_mrope(config), options.stages is not None
    original = not inside and (not plain or policy.positions == "original")
    if inside:
        configure_inside(vllm_config, name)
    else:
        refuse(vllm_config, policy, original)
    if plain and original:
        # vLLM's runner numbers by the model's get_mrope_input_positions() where it finds sections
        config.rope_parameters = {"rope_type": "default", "mrope_section": [1, 1, 1]}
    config.toprl = {**asdict(options), "digest": options.digest, "plain": plain, "original": original}
    config.architectures = [(INSIDE if inside else PREFIX) + name]
    model._model_info, model._architecture = model.registry.inspect_model_cls(config.architectures, model)
    logger.info("toprl: %s (%s)", options.describe(name), options.digest)


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


def configure_inside(vllm_config: VllmConfig, name: str) -> None:
    """Choose the worker and the scheduler of pruning inside the decoder, and refuse what they cannot do."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    if name in NOT_INSIDE:
        able = ", ".join(each for each in ARCHITECTURES if each not in NOT_INSIDE)
        raise ValueError(f"{KEY}: stages in {name}: {NOT_INSIDE[name]}; give keep in place of stages. Classes: {able}")
    model, parallel, scheduler = vllm_config.model_config, vllm_config.parallel_config, vllm_config.scheduler_config
    batched = scheduler.max_num_batched_tokens
    eager = model.enforce_eager and vllm_config.compilation_config.mode in (None, CompilationMode.NONE)
    wrong: dict[str, Any] = {
        "--no-enable-prefix-caching": vllm_config.cache_config.enable_prefix_caching,
        "--no-enable-chunked-prefill": scheduler.enable_chunked_prefill,
        f"--max-num-batched-tokens {model.max_model_len} or more": batched < model.max_model_len,
        "--enforce-eager": not eager,
        "--runner generate": model.runner_type != "generate",
        "--no-async-scheduling": scheduler.async_scheduling,
        "VLLM_USE_V2_MODEL_RUNNER=0": vllm_config.use_v2_model_runner,
        "no --enable-mm-embeds": model.multimodal_config.enable_mm_embeds,
        "no --video-pruning-rate": model.multimodal_config.video_pruning_rate,
        "no --enable-lora": vllm_config.lora_config is not None,
        "no --speculative-config": vllm_config.speculative_config is not None,
        "no --kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "no --disable-hybrid-kv-cache-manager": scheduler.disable_hybrid_kv_cache_manager,
        "no --scheduler-cls": scheduler.scheduler_cls is not None,
        "no --worker-cls": parallel.worker_cls != "auto",
        "no --enable-dbo": parallel.enable_dbo,
        "no --kv-sharing-fast-prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "--pipeline-parallel-size 1": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size 1": (parallel.decode_context_parallel_size or 1) > 1,
    }
    if found := [fix for fix, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(
            f"{KEY}: stages inside the decoder need {'; '.join(found)} (docs/serve.md says why); or prune before the "
            "language model, by keep"
        )
    scheduler.async_scheduling = False
    scheduler.scheduler_cls = f"{PACKAGE}.pages.StageScheduler"
    parallel.worker_cls = f"{PACKAGE}.worker.{'StageCPUWorker' if current_platform.is_cpu() else 'StageGPUWorker'}"
