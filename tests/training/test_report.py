"""The report: what it shows, that it stands alone, and how it fails on incomplete inputs."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from toprl_models import strips
from training import charts, report
from training.evaluation.methods import METHODS
from training.explained import LINKS, explanation

STAGES = [[0, 9, 10, 63], [9, 63], [9]]
RESULTS: dict[str, Any] = {
    "environment": {
        "python": "3.11.2",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "device": "cpu",
        "cpu_count": 2,
        "date": "2025-02-03",
    },
    "schedule": {
        "layers": [1, 2, 3],
        "keep": [8, 4, 2],
        "num_visual": 64,
        "num_layers": 6,
        "average_tokens": 82 / 6,
        "macs_ratio": 0.21,
    },
    "tasks": {
        "ocr": {
            "n": 512,
            "rows": [
                {"method": "full", "accuracy": [0.97], "average_tokens": 64.0},
                {"method": "toprl", "accuracy": [0.94, 0.95, 0.93], "average_tokens": 82 / 6},
                {"method": "fastv", "accuracy": [0.7], "average_tokens": 82 / 6},
                {"method": "random", "accuracy": [0.25, 0.35], "average_tokens": 82 / 6},
            ],
            "argmax": {
                "accuracy": [0.96, 0.95, 0.97],
                "kept": [0.2, 0.25, 0.15],
                "retained": [[0.4, 0.15, 0.05], [0.5, 0.2, 0.05], [0.3, 0.1, 0.05]],
            },
        },
        "shape": {
            "n": 256,
            "rows": [
                {"method": "full", "accuracy": [0.9], "average_tokens": 64.0},
                {"method": "toprl", "accuracy": [0.8], "average_tokens": 82 / 6},
                {"method": "fastv", "accuracy": [0.81], "average_tokens": 82 / 6},
                {"method": "random", "accuracy": [0.5], "average_tokens": 82 / 6},
            ],
            "argmax": {"accuracy": [0.88], "kept": [0.3], "retained": [[0.5, 0.3, 0.1]]},
        },
    },
    "runs": {"ocr": ["ocr_seed0", "ocr_seed1", "ocr_seed2"], "shape": ["shape_seed0"]},
}


def noise_image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8))


def gallery() -> list[dict[str, Any]]:
    buffer = io.BytesIO()
    noise_image().save(buffer, format="PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    item = {"kind": "ocr", "image": image, "question": "which digit <b> ?", "reference": "7", "stages": STAGES}
    return [{**item, "full_answer": "7", "pruned_answer": answer} for answer in ("7", "3")]


def metrics(iterations: int = 4) -> list[dict[str, Any]]:
    names = ("reward", "accuracy", "entropy", "kl_k3", "clip_fraction", "value_loss", "explained_variance", "seconds")
    rows = []
    for i in range(iterations):
        row: dict[str, Any] = {name: 0.1 * (i + 1) for name in names}
        rows.append({**row, "iteration": i, "retained": [0.5 / (i + 1), 0.25 / (i + 1), 0.125 / (i + 1)]})
    return rows


def write_inputs(folder: Path, results: dict[str, Any]) -> None:
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "gallery.json").write_text(json.dumps(gallery()))
    for runs in results["runs"].values():
        for run in runs:
            (folder / run).mkdir()
            (folder / run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_inputs(tmp_path, RESULTS)
    return tmp_path


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    write_inputs(folder, RESULTS)
    return report.write_report(folder).read_text()


def row(html: str, name: str) -> list[str]:
    """The cells' inner HTML of the table row that starts with ``name``."""
    found = re.search(rf"<tr[^>]*><th>{re.escape(name)}</th>(.*?)</tr>", html)
    assert found, f"no row {name!r}"
    return re.findall(r"<td[^>]*>(.*?)</td>", found[1])


def test_sections_come_in_order(html: str) -> None:
    marks = ["<h1>TOP-RL on the embedded tiny LLaVA</h1>", 'id="accuracy"', 'id="curves"', 'id="gallery"']
    places = [html.index(mark) for mark in marks]
    assert places == sorted(places)


def test_page_needs_nothing_from_outside(html: str) -> None:
    without = re.sub(r'<a href="https://[^"]*">', "", html)  # links load nothing
    assert "http:" not in without and "https:" not in without  # ":" is no base64 letter, so this cannot hit image data
    assert not re.search(r"<(script|link|iframe|base)\b|@import", html)
    references = re.findall(r'(?:src|href)="([^"]*)"', without) + re.findall(r"url\(([^)]*)\)", html)
    assert references
    assert [one[:40] for one in references if not one.startswith(("data:image/png;base64,", "#"))] == []


def test_the_same_inputs_give_the_same_page(folder: Path) -> None:
    first = report.write_report(folder).read_bytes()
    assert report.write_report(folder).read_bytes() == first


def test_header_states_environment_and_schedule(html: str) -> None:
    assert "2025-02-03 · 2 CPU cores · Python 3.11.2 · torch 2.13.0 · transformers 5.23.0" in html
    assert "before layer 1 it keeps 8, before layer 2 it keeps 4 and before layer 3 it keeps 2 of the 64" in html
    assert "13.7 of 64" in html and "0.21×" in html
    assert row(html, "Visual tokens seen") == ["64", "8", "4", "2", "2", "2"]


def test_accuracy_table(html: str) -> None:
    assert row(html, "TOP-RL") == ['<b>94.0<span class="sd">± 1.0</span></b>', "80.0", "13.7"]
    assert row(html, "FastV") == ["70.0", "<b>81.0</b>", "13.7"]
    assert row(html, "Full model, no pruning") == ["97.0", "90.0", "64.0"]  # best of all, yet not a competitor
    deviation = 100 * statistics.stdev([0.25, 0.35])
    assert row(html, "Random patches")[0] == f'30.0<span class="sd">± {deviation:.1f}</span>'
    assert row(html, "Headroom: full − random, points") == ["67.0", "40.0", ""]
    assert row(html, "Arg-max accuracy, %")[1] == "88.0"
    assert row(html, "Arg-max kept, stage mean, %")[0].startswith("20.0")
    assert row(html, "Arg-max kept by stage, %") == ["40/15/5", "50/30/10", ""]


def test_method_missing_from_one_task_leaves_a_dash(folder: Path) -> None:
    results = copy.deepcopy(RESULTS)
    results["tasks"]["ocr"]["rows"].append({"method": "new <way>", "accuracy": [0.5], "average_tokens": 12.0})
    (folder / "results.json").write_text(json.dumps(results))
    assert row(report.write_report(folder).read_text(), "new &lt;way&gt;") == ["50.0", "–", "12.0"]


def test_who_wins_is_stated(html: str) -> None:
    assert "highest accuracy of the pruned methods on 1 of 2 question kinds; it is beaten on shape." in html
    assert "ocr: <b>TOP-RL first</b> with 94.0 %, 24.0 points ahead of FastV (more than" in html
    assert "shape: <b>FastV first</b> with 81.0 %; TOP-RL is number 2, 1.0 points behind (within" in html


def test_verdict_of_a_tie() -> None:
    found = {"full": [0.99], "toprl": [0.9], "fastv": [0.90001], "random": [0.5]}
    assert "<b>TOP-RL and FastV equal</b> with 90.0 %" in report.verdict("ocr", 512, found)


def test_verdict_noise_is_the_interval_of_a_difference() -> None:
    text = report.verdict("ocr", 400, {"toprl": [0.5], "random": [0.5]})
    assert "±6.9" in text  # 1.96 * sqrt(2 * .25 / 400) = 6.93 points


def test_curves_have_one_line_per_run(folder: Path) -> None:
    runs = report.read_runs(folder, report.read(folder, "results.json"))
    figure = charts.curves_figure(runs)
    assert [len(axes.lines) for axes in figure.axes] == [4, 4, 4, 4, 4, 0]
    legend = figure.axes[-1].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["ocr (3 seeds)", "shape"]
    reward = figure.axes[0].lines[0]
    np.testing.assert_allclose(reward.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(reward.get_ydata(), [0.1, 0.2, 0.3, 0.4])


def test_retained_figure_has_one_line_per_stage_and_run(folder: Path) -> None:
    runs = report.read_runs(folder, report.read(folder, "results.json"))
    axes = charts.retained_figure(runs, num_visual=64, keep=[8, 4, 2]).axes
    curves = [[line for line in one.lines if line.get_label() in ("stage 1", "stage 2", "stage 3")] for one in axes]
    assert [len(one) for one in curves] == [9, 3, 0]
    np.testing.assert_allclose(curves[1][2].get_ydata(), [8, 4, 8 / 3, 2])
    budgets = [line for line in axes[1].lines if line not in curves[1]]
    assert [np.unique(np.asarray(line.get_ydata())).tolist() for line in budgets] == [[8], [4], [2]]


@pytest.mark.parametrize("kept", [[27], [0], [7, 63], [9, 10, 18], list(range(64)), []])
@pytest.mark.parametrize("scale", [1, 2])
def test_strip_fades_exactly_the_dropped_patches(kept: list[int], scale: int) -> None:
    image = noise_image()
    drawn = np.asarray(strips.draw_stage(image, kept, side=8, scale=scale)).astype(float)
    assert drawn.shape == (128 * scale + 2 * scale, 128 * scale + 2 * scale, 3)
    inner = drawn[scale:-scale, scale:-scale]
    source = np.asarray(image).repeat(scale, 0).repeat(scale, 1).astype(float)
    patch = 16 * scale
    for index in range(64):
        r, c = divmod(index, 8)
        area = np.s_[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
        if index in kept:
            np.testing.assert_array_equal(inner[area], source[area])
            continue
        outline = np.zeros((patch, patch), bool)  # the strip along each kept neighbour's edge or corner
        for dr in (-1, 0, 1):
            for dc in (-1, 0, 1):
                if 0 <= r + dr < 8 and 0 <= c + dc < 8 and index + 8 * dr + dc in kept:
                    rows = {-1: slice(0, scale), 0: slice(None), 1: slice(-scale, None)}
                    outline[rows[dr], rows[dc]] = True
        faded = source[area] + strips.FADE * (np.array(strips.FADED) - source[area])
        np.testing.assert_allclose(inner[area][~outline], faded[~outline], atol=0.5)
        assert (inner[area][outline] == strips.OUTLINE).all()


def test_strip_outline_of_border_patches_lies_in_the_margin() -> None:
    drawn = np.asarray(strips.draw_stage(noise_image(), range(64), side=8, scale=1))
    frame = np.ones((130, 130), bool)
    frame[1:-1, 1:-1] = False
    assert (drawn[frame] == strips.OUTLINE).all()
    empty = np.asarray(strips.draw_stage(noise_image(), [], side=8, scale=1))
    assert not (empty == strips.OUTLINE).all(-1).any()


def test_strip_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match=r"kept=\[64, -1\] must lie in 0\.\.63"):
        strips.draw_stage(noise_image(), [3, 64, -1], side=8)
    with pytest.raises(ValueError, match="image is 128x128; its sides must be multiples of side=7"):
        strips.draw_stage(noise_image(), [3], side=7)


def test_gallery_shows_image_stages_and_marks(html: str) -> None:
    uris = re.findall(r'src="data:image/png;base64,([^"]*)"', html)
    assert len(uris) == 2 * (1 + len(STAGES))
    for uri, kept in zip(uris, [list(range(64)), *STAGES] * 2, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))))
        np.testing.assert_array_equal(shown, np.asarray(strips.draw_stage(noise_image(), kept, side=8)))
    assert (
        re.findall(r"(?:image|stage \d) · \d+", html) == ["image · 64", "stage 1 · 4", "stage 2 · 2", "stage 3 · 1"] * 2
    )
    assert html.count('<span class="right">7 ✓</span>') == 3
    assert html.count('<span class="wrong">3 ✗</span>') == 1
    assert "the full model is right 2 times, the pruned one 1" in html.replace("\n", " ")
    assert "which digit &lt;b&gt; ?" in html


def test_methods_are_explained_with_their_papers(html: str) -> None:
    found = re.search(r'<section id="methods">.*?</section>', html, flags=re.DOTALL)
    assert found
    terms = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", found[0])
    names = ["full", "toprl", "fastv", "random", "argmax"]
    assert [term for term, _ in terms] == [report.label(name) for name in names]
    assert all(text.endswith((".", "</a>")) and len(text) > 30 for _, text in terms)
    assert LINKS["fastv"] in terms[2][1] and "TOP-RL: Task-Optimized" in html


def test_every_method_has_an_explanation() -> None:
    assert all(len(explanation(name)) > 20 for name in METHODS)


def test_phones_get_their_own_charts_and_labelled_cells(html: str) -> None:
    assert html.count('<div class="narrow-only"><svg') == html.count('<div class="wide-only"><svg') == 2
    widths = [float(width) for width in re.findall(r'<svg[^>]*width="([\d.]+)pt"', html)]
    assert [width < 300 for width in widths] == [False, True] * 2
    assert 'data-label="ocr"' in html and 'data-label="tokens"' in html


@pytest.mark.parametrize("name", ["results.json", "gallery.json", "shape_seed0/metrics.jsonl"])
def test_missing_file_is_named_with_the_remedy(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError) as raised:
        report.write_report(folder)
    assert name in str(raised.value)
    assert f"run: python training/demo.py --output_dir {folder}" in str(raised.value)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("name", ["results.json", "gallery.json", "ocr_seed1/metrics.jsonl"])
def test_broken_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text('{"half": ')
    with pytest.raises(ValueError, match=rf"{name} is not valid JSON .*run: python training/demo\.py"):
        report.write_report(folder)


@pytest.mark.parametrize("name", ["results.json", "gallery.json", "ocr_seed1/metrics.jsonl"])
def test_empty_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("")
    with pytest.raises(ValueError, match=rf"{name} (is not valid JSON|has no rows).*run: python training/demo\.py"):
        report.write_report(folder)


@pytest.mark.parametrize(
    "path",
    [
        "environment",
        "environment.date",
        "schedule.keep",
        "schedule.macs_ratio",
        "tasks",
        "tasks.ocr.n",
        "tasks.shape.argmax",
        "tasks.shape.argmax.retained",
        "tasks.ocr.rows[2].accuracy",
        "tasks.ocr.rows[0].average_tokens",
        "runs",
    ],
)
def test_missing_key_is_named(folder: Path, path: str) -> None:
    results = copy.deepcopy(RESULTS)
    *parents, last = re.findall(r"\w+", path)
    place: Any = results
    for key in parents:
        place = place[int(key)] if key.isdigit() else place[key]
    del place[last]
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=rf"results\.json: key '{re.escape(path)}' is missing; run: python") as raised:
        report.write_report(folder)
    assert str(folder) in str(raised.value)


def test_missing_reference_method_is_named(folder: Path) -> None:
    results = copy.deepcopy(RESULTS)
    results["tasks"]["shape"]["rows"].pop()
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"key 'tasks\.shape\.rows\.random' is missing"):
        report.write_report(folder)


def test_missing_key_of_gallery_and_metrics_is_named(folder: Path) -> None:
    items = gallery()
    del items[1]["pruned_answer"]
    (folder / "gallery.json").write_text(json.dumps(items))
    with pytest.raises(ValueError, match=r"gallery\.json: key 'items\[1\]\.pruned_answer' is missing"):
        report.write_report(folder)
    rows = metrics()
    del rows[2]["kl_k3"]
    (folder / "shape_seed0" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"shape_seed0/metrics\.jsonl: key 'rows\[2\]\.kl_k3' is missing"):
        report.write_report(folder)


def test_gallery_image_that_is_no_png_is_named(folder: Path) -> None:
    items = gallery()
    items[0]["image"] = "bm8gaW1hZ2U="
    (folder / "gallery.json").write_text(json.dumps(items))
    with pytest.raises(ValueError, match=r"gallery\.json: items\[0\]\.image is not a base64 PNG"):
        report.write_report(folder)


def test_no_curve_is_cut() -> None:
    runs = {"ocr": [{"iteration": np.arange(3.0), "retained": np.array([[0.5], [0.01], [0.002]])}]}
    axes = charts.retained_figure(runs, num_visual=64, keep=[8]).axes[0]
    assert axes.get_ylim()[0] < 64 * 0.002
