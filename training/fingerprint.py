"""What a stored number depends on beyond its flags: the contents of the samples, the weights, and the code.

Answers of an evaluation, checkpoints of a training, cached measurements and the paper's results are stored beside what
they depend on. A program that would go on compares that with what it has now (``differences``), and refuses or starts
again. A digest is the first 16 hexadecimal digits of a SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from toprl_models.registry import Method
from training.tasks import Sample, Task, encode

LIBRARY = ("toprl_kernels", "toprl_models", "training")
SAMPLED = 64  # weights of each parameter that go into the fingerprint of a large model


def differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    """List "name: was theirs, now ours" for everything in which two nested dicts of JSON data differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = dict.fromkeys([*theirs, *ours])
        parts = [differences(theirs.get(k), ours.get(k), f"{name}.{k}" if name else k) for k in keys]
        return [one for part in parts for one in part]
    return [] if theirs == ours else [f"{name}: was {json.dumps(theirs)}, now {json.dumps(ours)}"]


def digest_of(value: Any) -> str:
    """Digest JSON data; whatever is not JSON counts as its ``str``."""
    return _digest([json.dumps(value, sort_keys=True, default=str).encode()])


def versions() -> dict[str, str]:
    """Name the libraries that a rounding error may depend on."""
    return {"torch": str(torch.__version__), "transformers": transformers.__version__}


def samples_digest(task: Task, samples: Iterable[Sample]) -> str:
    """Digest everything that is shown, asked and compared with; every image is decoded.

    Raises:
        ValueError: a sample is unreadable; the message names file and row.
    """

    def parts() -> Iterator[bytes]:
        for sample in samples:
            text = [sample.key, task.text(sample), sample.answer, sample.answers, sample.choices, sample.bbox]
            yield json.dumps([*text, sample.info], sort_keys=True, default=str).encode()
            for picture in sample.video or sample.all_images:
                yield f"{picture.mode} {picture.size}".encode()
                yield picture.tobytes()

    return _digest(parts())


def processor_digest(processor: Any, task: Task, sample: Sample) -> str:
    """Digest what the processor makes of a sample: its settings, tokenizer and prompt template show in it."""
    encoded = sorted(encode(processor, task, [sample], "cpu").items())
    return _digest(
        name.encode() + (_bytes(value) if isinstance(value, Tensor) else str(value).encode()) for name, value in encoded
    )


def weights_digest(module: nn.Module, sampled: int | None = None) -> str:
    """Digest the names, shapes and values of all parameters and buffers.

    Args:
        sampled: so many evenly spread values of each, which suffices where training changes them all; None takes every
            value. Of weights that are offloaded (on "meta"), names and shapes alone.
    """

    def parts() -> Iterator[bytes]:
        for name, tensor in sorted(module.state_dict().items()):
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
            if tensor.device.type != "meta" and tensor.numel():
                flat = tensor.detach().flatten()
                yield _bytes(flat[:: max(1, len(flat) // sampled)] if sampled else flat)

    return _digest(parts())


def model_facts(model: Any) -> dict[str, Any]:
    """Everything about a model that its answers depend on, as JSON data."""
    return {
        "name": model.config._name_or_path,
        "config": digest_of(model.config.to_dict()),
        "weights": weights_digest(model, SAMPLED),
        "dtype": str(model.dtype),
        "attention": model.config.get_text_config()._attn_implementation,
        "device": model.device.type,
    }


def code_facts(methods: Iterable[Method] = ()) -> dict[str, str]:
    """Digest the source of this library, and of those ``methods`` that come from elsewhere.

    Of a method of an installed package, that is the whole package; of a class in a file, the file and the modules of
    the same folder that it imports.
    """
    found = {name: _tree_digest(_folder(importlib.import_module(name))) for name in LIBRARY}
    for method in methods:
        for part in method.parts or (method,):
            module = sys.modules[part.policy.__module__]
            top = sys.modules[module.__name__.partition(".")[0]]
            if top.__name__ in LIBRARY:
                continue
            if hasattr(top, "__path__"):
                found[top.__name__] = _tree_digest(_folder(top))
            else:
                files = sorted(_imported(module))
                found[str(files[0])] = _digest(file.read_bytes() for file in files)
    return found


def _imported(module: ModuleType) -> list[Path]:
    """List the file of a module, then those of its folder that it imports, directly or not."""
    file = Path(str(module.__file__))
    found, waiting = {file: None}, [module]
    while waiting:
        values = vars(waiting.pop()).values()
        names = {one.__name__ if isinstance(one, ModuleType) else getattr(one, "__module__", None) for one in values}
        for name in sorted(name for name in names if isinstance(name, str)):
            other = sys.modules.get(name)
            path = Path(getattr(other, "__file__", None) or "")
            inside = path.is_relative_to(file.parent) and "site-packages" not in path.parts
            if other is not None and inside and name.partition(".")[0] not in LIBRARY and path not in found:
                found[path] = None
                waiting.append(other)
    return list(found)


def _folder(package: ModuleType) -> Path:
    return Path(next(iter(package.__path__)))


@cache
def _tree_digest(folder: Path) -> str:
    files = sorted(folder.rglob("*.py"))
    return _digest(part for file in files for part in (str(file.relative_to(folder)).encode(), file.read_bytes()))


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))  # so that no two lists of parts are one stream of bytes
        digest.update(part)
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()
