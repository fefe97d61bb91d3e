"""Draw which visual tokens each stage keeps, for an image and a question, and compare the answers.

    python -m toprl_models.show tiny docs/scene.png "which digit is in the picture ?" --method fastv --keep 0.5
    python -m toprl_models.show Qwen/Qwen2.5-VL-3B-Instruct photo.jpg "What is on the table?" --method pyramiddrop

Writes NAME.png and NAME.html (``--output NAME``). Several images before the question make a prompt with all of them.
``tiny`` is the embedded model. Tiles and overviews are drawn each for itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from toprl_models import tiny
from toprl_models.command import parser_of
from toprl_models.integrations.lmms_eval import load_policy
from toprl_models.panels import Panel, panels_of
from toprl_models.policy import Policy
from toprl_models.processors import encode, load_processor
from toprl_models.pruner import attach
from toprl_models.registry import layers_for, method_of, schedule_for
from toprl_models.runtime.state import StageTrace
from toprl_models.schedule import Schedule
from toprl_models.strips import Drawing, remark, strip, strip_html, strip_png


@dataclass(frozen=True)
class Answer:
    """An answer, with what it took.

    Attributes:
        text: new tokens, decoded.
        seconds: wall-clock time of ``generate()``.
        trace: what each stage kept; empty without pruning.
    """

    text: str
    seconds: float
    trace: tuple[StageTrace, ...] = ()

    def kept(self) -> list[list[int]]:
        """List the raster numbers of the tokens that each stage kept of the first prompt."""
        return [[number for number in stage.indices[0].tolist() if number >= 0] for stage in self.trace]


def load(name: str) -> tuple[Any, Any]:
    """Load a model in eval mode and its processor: ``tiny``, a folder or a Hub id; on the GPU where there is one.

    Raises:
        ImportError: the processor needs a package that is not installed.
        OSError, ValueError: transformers finds no image-text model there.
    """
    from transformers import AutoModelForImageTextToText

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "tiny":
        return tiny.load(device=device)
    processor = load_processor(name)
    return AutoModelForImageTextToText.from_pretrained(name, dtype="auto").eval().to(device), processor


def prepare(
    model: Any, method: str, keep: float | None = None, policy: str | None = None, schedule: Schedule | None = None
) -> tuple[Policy, Schedule]:
    """Make the policy and the schedule of a method for a budget.

    Args:
        model: the model, unattached.
        method: a name that ``method_of`` takes.
        keep: share of the visual tokens, averaged over all decoder layers.
        policy: of a trained method, the folder or Hub id.
        schedule: instead of ``keep``.

    Raises:
        ValueError: unknown method, an impossible budget, no budget or two, or a trained method without its policy.
    """
    info = method_of(method)
    if info.trained and policy is None:
        raise ValueError(f"method={method!r} needs a trained policy: give the folder that training/ppo.py wrote")
    if policy is not None and not info.trained:
        raise ValueError(f"policy={policy!r}: method {method} takes no trained policy; leave it out")
    if (keep is None) == (schedule is None):
        raise ValueError(f"keep={keep}, schedule={schedule}: give one of them")
    trained = None if policy is None else load_policy(policy).to(model.device)
    layers = layers_for(info, model, () if trained is None else trained.stage_layers)
    if schedule is None:
        schedule = schedule_for(model, method, keep=keep, layers=layers)
    return info.make(layers, trained), schedule


def answer(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    tokens: int,
    pruning: tuple[Policy, Schedule] | None = None,
) -> Answer:
    """Generate an answer greedily, with the policy and the schedule of ``pruning`` or without any.

    Args:
        model: the model, unattached.
        processor: decodes the answer.
        inputs: the model's arguments for one prompt.
        tokens: most new tokens.
        pruning: from ``prepare``.
    """
    context = nullcontext() if pruning is None else attach(model, pruning[0], schedule=pruning[1])
    with context as pruner:
        begin = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        seconds = time.perf_counter() - begin
        trace = () if pruner is None else tuple(pruner.trace)
    text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Answer(text.strip(), seconds, trace)


def layout(model: Any, processor: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]) -> list[Panel]:
    """Lay out the visual tokens of a prompt, with the colours of the processor's normalisation undone."""
    known = getattr(processor, "image_processor", None)
    mean, std = (getattr(known, name, None) for name in ("image_mean", "image_std"))
    return panels_of(model, inputs, images, mean, std)


def write(
    name: str, title: str, facts: Sequence[tuple[str, str]], drawings: Sequence[Drawing], note: str
) -> list[Path]:
    """Write NAME.png and NAME.html; return their paths."""
    picture, page = Path(f"{name}.png"), Path(f"{name}.html")
    picture.parent.mkdir(parents=True, exist_ok=True)
    strip_png(drawings).save(picture)
    page.write_text(strip_html(title, facts, drawings, note))
    return [picture, page]


def show(options: argparse.Namespace) -> str:
    """Do what a command line asks for; return what it says."""
    images = [Image.open(path).convert("RGB") for path in options.image]
    model, processor = load(options.model)
    pruning = prepare(model, options.method, options.keep, options.policy)
    inputs = encode(processor, images, options.question, model)
    full = answer(model, processor, inputs, options.max_new_tokens)
    pruned = answer(model, processor, inputs, options.max_new_tokens, pruning)
    panels = layout(model, processor, inputs, images)
    drawings = strip(panels, pruning[1].layers, pruned.kept())
    num_visual = pruned.trace[0].num_visual[0]
    average = pruning[1].average_tokens(num_visual, model.config.get_text_config().num_hidden_layers)
    facts = [
        ("question", options.question),
        (
            "method",
            f"{method_of(options.method).title}, {average:.1f} of {num_visual} tokens, averaged over all layers",
        ),
        ("full", full.text or "(empty)"),
        ("pruned", pruned.text or "(empty)"),
    ]
    paths = write(options.output, f"{options.model}: {options.method}", facts, drawings, remark(panels))
    return "\n".join([*(f"{term}: {value}" for term, value in facts), *(f"wrote {path}" for path in paths)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, and print answers and paths."""
    parser = parser_of("show", __doc__)
    parser.add_argument("model", help="tiny, or folder or Hub id of a model")
    parser.add_argument("image", nargs="+", help="image files")
    parser.add_argument("question", help="the question, the last argument before the flags")
    parser.add_argument("--method", help="a name, my_file.py:MyMethod, or several joined by +; toprl with --policy")
    parser.add_argument("--policy", help="folder or Hub id of a trained policy")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens, averaged over all layers")
    parser.add_argument("--output", default="strip", help="writes OUTPUT.png and OUTPUT.html (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="length of the answers (%(default)s)")
    options = parser.parse_args(arguments)
    options.method = options.method or ("toprl" if options.policy else "fastv")
    try:
        print(show(options))
    except (ValueError, TypeError, OSError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
