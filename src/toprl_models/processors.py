"""Loading and calling of processors, and what they need beyond transformers and Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

# import names of the packages of the extra "vision": all video processors need torchvision, SmolVLM's num2words too
PACKAGES = ("torchvision", "num2words")


def load_processor(name_or_path: str, **options: Any) -> Any:
    """Load the processor of a model.

    Args:
        name_or_path: Hub id or local folder.
        options: of ``AutoProcessor.from_pretrained``.

    Raises:
        ImportError: the processor needs a package that is not installed; the message says how to install it.
        OSError, ValueError: as ``AutoProcessor.from_pretrained``.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(name_or_path, **options)
    except (ImportError, ValueError) as error:
        # transformers raises ValueError, too, for a video processor without torchvision
        named = [package for package in PACKAGES if package in str(error).lower()]
        if not named and isinstance(error, ValueError):
            raise
        needed = " and ".join(named) or "a package that is not installed"
        raise ImportError(
            f"the processor of {name_or_path} needs {needed}: pip install 'toprl-kernels[vision]' installs "
            f"{' and '.join(PACKAGES)} (torchvision in the release that goes with your torch); transformers says: "
            f"{str(error).strip()}"
        ) from error


def encode(processor: Any, images: Sequence[Image.Image], question: str, model: PreTrainedModel) -> dict[str, Any]:
    """Make the model's arguments for one prompt: images, then the question, in the chat template.

    Args:
        processor: the model's processor.
        images: any number of them.
        question: text after the images.
        model: gives device and, for pixels, the type of the weights.

    Returns:
        What the processor returns, as tensors of one row.
    """
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    bos = getattr(processor.tokenizer, "bos_token", None)  # which templates begin with, and tokenizers add again
    twice = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    inputs = processor(text=[text], images=list(images), return_tensors="pt", **twice).to(model.device)
    return {
        name: value.to(model.dtype) if hasattr(value, "is_floating_point") and value.is_floating_point() else value
        for name, value in inputs.items()
    }
