"""The page of examples/live, in a real browser."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ROOT = Path(__file__).resolve().parents[2]
SWITCHES = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
# Generous: nothing here is about speed.
PATIENCE = 240_000


@pytest.fixture(scope="module")
def address():
    command = [sys.executable, str(ROOT / "examples" / "live" / "serve.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().strip()
        server.terminate()
        assert server.wait() == 0


@pytest.fixture(scope="module")
def browser():
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on PATH (Debian's package `chromium`), and none in the environment variable CHROMIUM")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1000, "height": 1000})
    page.set_default_timeout(PATIENCE)
    page.faults = []
    page.on("pageerror", lambda fault: page.faults.append(str(fault)))
    page.goto(address)
    playwright.expect(page.locator("#status")).to_have_text("ready")
    yield page
    assert page.faults == []
    page.close()


def pixels(page, canvas):
    """The grey bytes of a canvas."""
    return page.evaluate(f"Array.from(document.getElementById('{canvas}').getContext('2d').getImageData(0, 0, 320, 32).data).filter((_, i) => i % 4 === 0)")


def counter(page, name):
    return int(page.locator("#counters tr", has_text=re.compile(f"^{name}")).locator("td").nth(1).inner_text().replace(",", ""))


def test_draws_dense_and_planned_side_by_side(page):
    page.select_option("#plan", "plan")
    assert page.locator("#map rect.ast").count() == 114
    page.click("#draw")
    playwright.expect(page.locator("#status")).to_have_text("done", timeout=PATIENCE)
    dense, planned = pixels(page, "dense"), pixels(page, "planned")
    # Digits: bright strokes on black; and the planned ones are not the same pixels, but close to them.
    assert max(dense) > 200 and min(dense) < 20
    assert dense != planned
    assert sum((a - b) ** 2 for a, b in zip(dense, planned)) / len(dense) < 100
    assert float(page.inner_text("#psnr").removesuffix(" dB")) > 30
    assert page.inner_text("#attention") == "69.7 %"
    # 50 steps of this request followed the plan, and its memory is free again.
    assert (counter(page, "steps"), counter(page, "layers_reused"), counter(page, "dense_steps")) == (50, 114, 0)
    assert (counter(page, "live_requests"), counter(page, "bytes")) == (0, 0)


def test_a_stopped_drawing_leaves_the_page_usable(page):
    # From inside the page, at the first step: a click from outside may come when the drawing is done.
    page.evaluate("""() => {
        const status = document.querySelector("#status");
        new MutationObserver((_, observer) => {
            if (!/step [0-9]+ of/.test(status.textContent)) return;
            observer.disconnect();
            document.querySelector("#stop").click();
        }).observe(status, { childList: true, characterData: true, subtree: true });
    }""")
    page.click("#draw")
    playwright.expect(page.locator("#status")).to_have_text("stopped", timeout=PATIENCE)
    page.fill("#seed", "3")
    page.click("#draw")
    playwright.expect(page.locator("#status")).to_have_text("done", timeout=PATIENCE)


@pytest.mark.parametrize("query", ["plan=nothing", "plan=plan&seed=-1", "plan=plan&seed=x", ""])
def test_a_wrong_request_is_answered_with_what_was_expected(page, address, query):
    answer = page.request.get(f"{address}/draw?{query}")
    assert answer.status == 400 and "expected" in answer.text()
