"""The console in a real browser: each of the seven types is tried by clicking. Screenshots stay in `out/console/`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from cli_runs import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
SHOTS = ROOT / "out" / "console"
SHOWN = {  # what of an answer has to be seen; random weights write no JSON, and our engine cannot make them
    "embeddings": "1.00",
    "reranker": "from place",
    "intent_router": "confidence",
    "task_llm": "",
    "multimodal_vision": "",
    "srl_parser": None,
    "extractor": None,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or pytest.skip("no chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_each_type_is_tried_by_clicking(browser: Any, address: str, width: int, scheme: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(f"{address}/console")
    page.wait_for_function("document.getElementById('model').options.length === 7")
    for model, shown in SHOWN.items():
        page.get_by_test_id("model").select_option(model)
        page.get_by_test_id("run").click()
        page.wait_for_function("document.getElementById('after').textContent", timeout=60_000)
        error = page.get_by_test_id("error").inner_text()
        if shown is None:
            assert "the model's answer is no JSON" in error
        else:
            assert not error and shown in page.get_by_test_id("result").inner_text()
        page.screenshot(path=SHOTS / f"{model}-{width}-{scheme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{model} scrolls sideways"
    page.get_by_test_id("model").select_option("intent_router")
    page.get_by_test_id("run").click()
    page.get_by_test_id("thumb-up").click()
    page.wait_for_function("/Recorded/.test(document.body.textContent)")
    page.get_by_test_id("tab-try").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("/intent_router/.test(document.getElementById('panel-live').textContent)")
    page.screenshot(path=SHOTS / f"live-{width}-{scheme}.png", full_page=True)
    page.keyboard.press("ArrowRight")
    page.wait_for_function("/no runs yet/.test(document.getElementById('panel-runs').textContent)")
    page.close()
    assert faults == []
