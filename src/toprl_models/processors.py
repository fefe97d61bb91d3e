"""Loading of processors, and what they need beyond transformers and Pillow."""

from __future__ import annotations

from typing import Any

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
