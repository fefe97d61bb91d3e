"""A page to try pruning on: an image, a question, two methods side by side, and what each stage keeps.

    make serve                                                          # the embedded model, on localhost
    python -m toprl_models.page Qwen/Qwen2.5-VL-3B-Instruct --port 7861

Shows the answers with and without pruning, the tokens kept at each stage on the image, average tokens, the decoder's
multiply-adds on visual tokens, and milliseconds. Needs gradio 6 (constraints-page.txt). One request runs at a time.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from toprl_models.command import parser_of
from toprl_models.families import family_of
from toprl_models.registry import METHODS
from toprl_models.schedule import Schedule
from toprl_models.show import Answer, answer, encode, layout, load, prepare
from toprl_models.strips import png_uri, remark, strip

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_MEGABYTES = 10
MAX_PIXELS = 20_000_000
MAX_QUESTION = 500  # characters
WAITING = 16  # requests in the queue
STYLE = """
.gradio-container { max-width: 1100px !important; }
.results { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 22px; }
.results h3 { margin: 0 0 4px; font-size: 17px; }
.results dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 12px; margin: 0 0 10px; }
.results dt { opacity: .7; } .results dd { margin: 0; overflow-wrap: anywhere; }
.results .kept { display: grid; grid-template-columns: repeat(auto-fit, minmax(120px, 1fr)); gap: 10px; }
.results figure { margin: 0; } .results img { width: 100%; display: block; } .results figcaption { font-size: 13px; }
"""


def open_image(
    path: str | Path | None, max_megabytes: float = MAX_MEGABYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Open an uploaded image; its size is read before it is decoded.

    Args:
        path: of the file; None where nothing was uploaded.
        max_megabytes: largest file.
        max_pixels: largest image.

    Returns:
        RGB.

    Raises:
        ValueError: no file, a larger one, or none of ``FORMATS``.
    """
    if path is None:
        raise ValueError("choose or upload an image first")
    size = Path(path).stat().st_size / 2**20
    if size > max_megabytes:
        raise ValueError(f"the file has {size:.1f} MB, at most {max_megabytes:g} are taken; send a smaller one")
    try:
        image = Image.open(path, formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"the image has {width} x {height} pixels, at most {max_pixels} are taken")
        return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the file is no image that can be read ({', '.join(FORMATS)}): {error}"[:300]) from error


class Trial:
    """A model and its processor, asked by one request at a time.

    Args:
        model: unattached.
        processor: the model's.
        policy: folder or Hub id of a trained policy, which brings the methods that need one.
        new_tokens: length of the answers.
    """

    def __init__(self, model: Any, processor: Any, policy: str | None = None, new_tokens: int = 32) -> None:
        self.model, self.processor, self.policy, self.new_tokens = model, processor, policy, new_tokens
        self.lock = threading.Lock()
        family = family_of(model)
        self.methods = [
            name
            for name, method in METHODS.items()
            if (policy is not None or not method.trained) and not method.refuses(family)
        ]

    def run(self, image: Image.Image, question: str, choices: Sequence[tuple[str, float]]) -> str:
        """Answer without pruning and with each method of ``choices``, (name, share of the tokens); results as HTML.

        Raises:
            ValueError: no question, a long one, or a budget that a method cannot meet.
        """
        question = question.strip()
        if not question or len(question) > MAX_QUESTION:
            raise ValueError(f"the question has {len(question)} characters; ask with 1 to {MAX_QUESTION}")
        with self.lock:
            inputs = encode(self.processor, [image], question, self.model)
            prunings = [
                prepare(self.model, name, keep, self.policy if METHODS[name].trained else None)
                for name, keep in choices
            ]
            for pruning in (None, *prunings):  # the first call of a size is slower
                answer(self.model, self.processor, inputs, 1, pruning)
            full = answer(self.model, self.processor, inputs, self.new_tokens)
            found = [answer(self.model, self.processor, inputs, self.new_tokens, pruning) for pruning in prunings]
            panels = layout(self.model, self.processor, inputs, [image])
        total = sum(panel.numbers.size + len(panel.others) for panel in panels)
        parts = [self._part("Without pruning", full, Schedule(((0, 1.0),)), total, "")]
        for (name, _), (_, schedule), one in zip(choices, prunings, found, strict=True):
            figures = "".join(
                f'<figure><img alt="{escape(drawing.title)}" src="{png_uri(drawing.picture)}">'
                f"<figcaption>{escape(drawing.title)}</figcaption></figure>"
                for drawing in strip(panels, schedule.layers, one.kept())
            )
            parts.append(self._part(METHODS[name].title, one, schedule, total, f'<div class="kept">{figures}</div>'))
        return f'<div class="results">{"".join(parts)}</div><p>{escape(remark(panels))}</p>'

    def _part(self, title: str, found: Answer, schedule: Schedule, total: int, kept: str) -> str:
        """Make the column of one answer."""
        config = self.model.config.get_text_config()
        average = schedule.average_tokens(total, config.num_hidden_layers)
        macs, whole = (one.macs(total, config) for one in (schedule, Schedule(((0, 1.0),))))
        facts = {
            "answer": found.text or "(empty)",
            "tokens": f"{average:.1f} of {total}, averaged over the layers",
            "multiply-adds": f"{macs / 1e6:.1f} M on visual tokens, {macs / whole:.0%}",
            "time": f"{1000 * found.seconds:.0f} ms",
        }
        terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
        return f"<section><h3>{escape(title)}</h3><dl>{terms}</dl>{kept}</section>"


def build(trial: Trial, options: argparse.Namespace) -> Any:
    """Build the page.

    Args:
        trial: answers.
        options: the command line's, from ``parse``.
    """
    import gradio

    def opened(path: str | None) -> Image.Image:
        try:
            return open_image(path, options.max_megabytes, options.max_pixels)
        except ValueError as error:
            raise gradio.Error(str(error)) from error

    def ask(path: str | None, text: str, first: str, keep: float, second: str, other: float) -> str:
        image = opened(path)
        try:
            return trial.run(image, text, [(first, keep), (second, other)])
        except (ValueError, TypeError) as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title="Prune visual tokens", analytics_enabled=False) as page:
        gradio.Markdown("# Prune visual tokens\nAn image, a question, and two methods: what stays, and what it costs.")
        with gradio.Row():
            with gradio.Column():
                path = gradio.File(label="image", file_types=["image"], type="filepath", height=110, elem_id="upload")
                if options.images:
                    gradio.Examples([[name] for name in options.images], path, label="or choose")
                shown = gradio.Image(label="the image", interactive=False, height=240)
            with gradio.Column():
                text = gradio.Textbox(options.question, label="question", max_length=MAX_QUESTION, elem_id="question")
                chosen = []
                for number, default in enumerate(("fastv", "pyramiddrop"), 1):
                    with gradio.Row():
                        method = gradio.Dropdown(trial.methods, value=default, label=f"method {number}")
                        keep = gradio.Slider(
                            0.05, 1, 0.4, step=0.05, label="share of the tokens", elem_id=f"keep{number}"
                        )
                    chosen += [method, keep]
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
        results = gradio.HTML(elem_id="results")
        path.change(lambda name: None if name is None else opened(name), path, shown, api_visibility="private")
        button.click(ask, [path, text, *chosen], results, api_visibility="private")
    page.queue(max_size=WAITING, default_concurrency_limit=1)
    return page


def launch(page: Any, options: argparse.Namespace, **more: Any) -> Any:
    """Serve the page on localhost, without anything from outside: no tunnel, no fonts, no statistics."""
    import gradio

    fonts = {"font": ["sans-serif"], "font_mono": ["monospace"]}
    return page.launch(
        server_name=options.host,
        server_port=options.port,
        share=False,
        max_file_size=f"{options.max_megabytes:g}mb",
        theme=gradio.themes.Default(**fonts),
        css=STYLE,
        footer_links=[],
        **more,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of("page", __doc__)
    parser.add_argument("model", nargs="?", default="tiny", help="tiny, or folder or Hub id of a model (%(default)s)")
    parser.add_argument("--policy", help="folder or Hub id of a trained policy")
    parser.add_argument("--images", nargs="*", default=[], help="image files to choose from")
    parser.add_argument("--question", default="which digit is in the picture ?", help="to begin with (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="length of the answers (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (%(default)s)")
    parser.add_argument("--max_megabytes", type=float, default=MAX_MEGABYTES, help="largest file (%(default)s)")
    parser.add_argument("--max_pixels", type=int, default=MAX_PIXELS, help="largest image (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model and serve its page until it is stopped."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    options = parse(arguments)
    model, processor = load(options.model)
    trial = Trial(model, processor, options.policy, options.max_new_tokens)
    launch(build(trial, options), options)


if __name__ == "__main__":
    main()
