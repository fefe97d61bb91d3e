"""The page in headless Chromium: upload, ask, change the budget, break the upload; also on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from toprl_models import page as pages
from toprl_models import tiny

ROOT = Path(__file__).parents[2]
SCENE = ROOT / "docs/scene.png"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    options = pages.parse(["--port", "7871", "--images", str(SCENE), "--max_megabytes", "1"])
    built = pages.build(pages.Trial(*tiny.load(), new_tokens=2), options)
    _, local, _ = pages.launch(built, options, prevent_thread_lock=True, quiet=True)
    yield local
    built.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "no chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, address: str, width: int = 1280) -> tuple[Page, list[str]]:
    """Open the page; the list fills with the addresses of requests to other hosts."""
    page, outside = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on(
        "request",
        lambda request: None if request.url.startswith((address, "data:", "blob:")) else outside.append(request.url),
    )
    page.goto(address)
    return page, outside


def upload(page: Page, path: Path) -> None:
    page.locator("#upload input[type=file]").set_input_files(path)


def ask(page: Page) -> list[str]:
    """Press the button and wait for new results; their pictures."""
    shown = "document.querySelector('#results .results')?.innerHTML ?? ''"  # the times differ in each
    before = page.evaluate(shown)
    page.locator("#ask").click()
    page.wait_for_function(f"before => ({shown}) !== before", arg=before)
    images = page.locator("#results img")
    return [image.get_attribute("src") for image in images.all()]


def test_upload_ask_and_change_the_budget(browser: Any, address: str, tmp_path: Path) -> None:
    page, outside = opened(browser, address)
    upload(page, SCENE)
    first = ask(page)
    results = page.locator("#results")
    expect(results).to_contain_text("Without pruning")
    expect(results).to_contain_text("25.5 of 64")  # PyramidDrop
    assert len(first) == 2 + 4  # FastV prunes once, PyramidDrop three times
    page.locator("#keep2 input[type=number]").fill("0.6")
    page.locator("#keep2 input[type=number]").press("Tab")
    second = ask(page)
    assert len(second) == 6 and second[:2] == first[:2] and second[3:] != first[3:]
    assert outside == []
    page.screenshot(path=tmp_path / "page.png", full_page=True)


def test_broken_upload_is_said(browser: Any, address: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(SCENE.read_bytes()[:300])
    page, _ = opened(browser, address)
    upload(page, broken)
    expect(page.get_by_text("no image that can be read").first).to_be_visible()


def test_question_without_an_image_is_said(browser: Any, address: str) -> None:
    page, _ = opened(browser, address)
    page.locator("#ask").click()
    expect(page.get_by_text("choose or upload an image first").first).to_be_visible()


def test_phone_does_not_scroll_sideways(browser: Any, address: str) -> None:
    page, _ = opened(browser, address, width=390)
    upload(page, SCENE)
    assert len(ask(page)) == 6
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("width", [1280, 390])
def test_strips_of_the_command_fit_a_phone(browser: Any, tmp_path: Path, width: int) -> None:
    from toprl_models import show

    show.main(["tiny", str(SCENE), "which digit is in the picture ?", "--output", str(tmp_path / "strip")])
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto((tmp_path / "strip.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
