"""Between tasks and models: loading, prompts, answers."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from toprl_models import tiny
from toprl_models.families import family_of, min_stage_of
from toprl_models.processors import load_processor
from training.tasks.base import Sample, Task

QUANTIZATIONS = ("4bit", "8bit")  # of a model's weights, by bitsandbytes
DTYPES = ("float32", "bfloat16", "float16")  # of a model's weights, as flags name them


def load_model(
    name_or_path: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    device_map: str | None = None,
    quantization: str | None = None,
) -> tuple[Any, Any]:
    """Frozen model and processor.

    Args:
        name_or_path: "tiny" for the embedded model, else a Hub id or a local folder.
        device: where the model goes; without meaning where ``device_map`` is given.
        dtype: the weights' type.
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; the model's default where it is None.
        device_map: "auto", a device, or a JSON object from modules to devices; needs accelerate. One GPU can be named
            in it, beside "cpu" and "disk".
        quantization: "4bit" (NF4) or "8bit" weights by bitsandbytes; computation stays in ``dtype``.

    Raises:
        ValueError: the model cannot be loaded so, or ``device_map`` is no JSON.
        ImportError: ``device_map`` without accelerate, ``quantization`` without bitsandbytes, or a processor without
            the packages that it needs.
    """
    transformers.utils.logging.disable_progress_bar()  # it would tear the training bar apart
    if name_or_path == "tiny" and device_map is None and quantization is None:
        model, processor = tiny.load(device=device, dtype=dtype)
        if attn_implementation:
            model.set_attn_implementation(attn_implementation)
        return model, processor
    from transformers import AutoModelForImageTextToText

    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if device_map is not None:
        options["device_map"] = parse_device_map(device_map)
    if quantization is not None:
        options["quantization_config"] = _quantization_config(quantization, dtype)
        options.setdefault("device_map", {"": device})  # quantised weights are made where they stay
    folder = str(tiny.CHECKPOINT) if name_or_path == "tiny" else name_or_path
    flags = {"attn_implementation": attn_implementation, "device_map": device_map, "quantization": quantization}
    chosen = "".join(f" --{name} {value}" for name, value in flags.items() if value)
    wrong = (
        f'--model_name_or_path {name_or_path}{chosen}: cannot be loaded as an image-text model; give "tiny", a Hub id '
        "or a local folder with config, weights and processor"
    )
    try:  # before the weights, which take longer
        processor = load_processor(folder, padding_side="left")
    except (OSError, ValueError) as error:
        raise ValueError(f"{wrong} ({error})") from error
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{wrong} ({error})") from error
    model.requires_grad_(False)
    return (model if "device_map" in options else model.to(device)).eval(), processor


def _quantization_config(name: str, dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"--quantization {name} needs {package}: pip install bitsandbytes accelerate")
    if name == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def check_stages(flag: str, layers: Sequence[int], model: Any) -> None:
    """Refuse stages that the model does not have.

    Raises:
        ValueError: the message names the flag, the layers and the depth.
    """
    depth, first = model.config.get_text_config().num_hidden_layers, min_stage_of(model, family_of(model))
    ascending = all(before < after for before, after in itertools.pairwise(layers))
    if not ascending or layers[0] < first or layers[-1] >= depth:
        raise ValueError(
            f"{flag} {' '.join(map(str, layers))}: the model has {depth} layers, so stages are ascending numbers from "
            f"{first} to {depth - 1}"
        )


def parse_device_map(text: str) -> str | dict[str, Any]:
    """The ``device_map`` of ``from_pretrained`` that a flag names.

    Raises:
        ValueError: ``text`` begins as a JSON object and is none.
        ImportError: accelerate is missing.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError(f"--device_map {text} needs accelerate: pip install accelerate")
    if not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"--device_map {text}: must be auto, a device, or a JSON object ({error})") from error


def device_of(model: Any) -> torch.device:
    """Where the model takes its inputs and runs its layers; weights that are offloaded lie elsewhere."""
    mapped = set(getattr(model, "hf_device_map", {}).values()) - {"disk"}
    devices = [torch.device("cuda", one) if isinstance(one, int) else torch.device(one) for one in mapped]
    accelerators = sorted((one for one in devices if one.type != "cpu"), key=str)
    if accelerators:
        return accelerators[0]
    return torch.device("cpu") if model.device.type == "meta" else model.device


def prompt(processor: Any, task: Task, sample: Sample) -> str:
    """The model's chat template around what the task asks; images and video go first.

    Raises:
        ValueError: the processor has no chat template, or the text holds the placeholder of an image or video.
    """
    text = task.text(sample)
    for name in ("image_token", "video_token"):
        token = getattr(processor, name, None)
        if token and token in text:
            raise ValueError(f"{sample.key}: the text holds {token!r}, which stands for an image; remove it: {text!r}")
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{type(processor).__name__} has no chat template; set processor.chat_template to the model's")
    shown = [{"type": "video"}] if sample.video else [{"type": "image"}] * len(sample.all_images)
    content = [*shown, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def encode(
    processor: Any, task: Task, samples: Sequence[Sample], device: str | torch.device
) -> dict[str, torch.Tensor]:
    """The left-padded model inputs of a batch of samples, all with images or all with a video."""
    texts = [prompt(processor, task, sample) for sample in samples]
    arguments: dict[str, Any] = {"text": texts, "padding": True, "return_tensors": "pt"}
    bos = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    if bos and texts[0].startswith(bos):
        arguments["add_special_tokens"] = False  # the template wrote it already
    if samples[0].video:
        arguments["videos"] = [np.stack([np.asarray(frame) for frame in s.video]) for s in samples]
        metadata = [dict(s.video_metadata or {}) for s in samples]
        arguments["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": metadata}
    elif any(s.images for s in samples):
        arguments["images"] = [list(s.all_images) for s in samples]
    else:
        arguments["images"] = [s.image for s in samples]
    return dict(processor(**arguments).to(device))


def read_answers(
    processor: Any, task: Task, samples: Sequence[Sample], inputs: dict[str, torch.Tensor], output: torch.Tensor
) -> tuple[list[str], list[float]]:
    """Texts behind the prompts in the sequences that ``generate()`` gave, and the metric of each."""
    decoded = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    texts = [text.strip() for text in decoded]
    return texts, [float(task.score(text, sample)) for text, sample in zip(texts, samples, strict=True)]


@torch.no_grad()
def answer(
    model: Any, processor: Any, task: Task, samples: Sequence[Sample], inputs: dict[str, torch.Tensor]
) -> tuple[list[str], torch.Tensor]:
    """Greedy answers of the model as it is now (attached or not), and their metric, float32 ``[B]`` on the CPU."""
    output = model.generate(**inputs, max_new_tokens=task.max_new_tokens, do_sample=False)
    texts, scores = read_answers(processor, task, samples, inputs, output)
    return texts, torch.tensor(scores)
