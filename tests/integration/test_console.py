"""The console and the API's reference in a real browser: tiny models of the seven types are tried by clicking, and
scripted ones for what tiny models do not do. Screenshots stay in `out/console/`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import ROOT
from gateway_fixtures import listening
from PIL import Image

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


SUM = "Calculate 9093 + 3137."
BIG = 33333333333333333333333333333333333333333333
ANSWERS = {  # by model
    "extractor": {"answer": {"big": BIG, "edge": 2**53 + 1, "half": 0.5}, "text": "", "repaired": True},
    "vision": {"answer": None, "text": "The left one is", "repaired": False},
    "blind": {"answer": None, "text": " ", "repaired": False},
}


class Scripted:
    """Replies to a chat with the texts of all turns, one word an event; cut off after `max_tokens` words."""

    def __init__(self, name: str):
        self.name = name

    async def call(self, method: str, *arguments: Any) -> Any:
        if method == "chat":
            choice = {"index": 0, "message": {"role": "assistant", "content": arguments[0]["messages"][-1]["content"]}}
            return {"id": "1", "object": "chat.completion", "created": 1, "model": self.name, "choices": [choice]}
        return ANSWERS[self.name]

    async def stream(self, method: str, *arguments: Any) -> AsyncIterator[str]:
        [body] = arguments
        words = " | ".join(message["content"] for message in body["messages"]).split()
        most = body.get("max_tokens") or 1000
        whole = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": self.name}
        events: list[dict[str, Any]] = [
            {"choices": [{"index": 0, "delta": {"content": f"{word} "}}]} for word in words[:most]
        ]
        reason = "length" if len(words) > most else "stop"
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        if body.get("stream_options"):
            usage = {"prompt_tokens": 9, "completion_tokens": len(words[:most]), "total_tokens": 9 + len(words[:most])}
            events.append({"choices": [], "usage": usage})
        for event in events:
            yield f"data: {json.dumps(whole | event)}\n\n"
        yield "data: [DONE]\n\n"


def write_run(folder: Path) -> None:
    folder.mkdir(parents=True)
    held_out = {"n": 9, "base": {"score": 0.0, "low": 0.0, "high": 0.1}, "srl": {"score": 0.5, "low": 0.2, "high": 0.8}}
    (folder / "result.json").write_text(json.dumps({"model_type": "task_llm", "minutes": 1.5, "held_out": held_out}))
    rows = [{"stage": "srl", "step": n, "loss": 0.0000685 * n, "kl": 0.0, "reward": -1234.5 + n} for n in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "metrics.parquet")
    script = "<script>document.title = origin === 'null' ? 'sandboxed' : 'open'</script>"
    (folder / "report.html").write_text(f"<!doctype html><title>x</title><h1>the report</h1>{script}")


@contextmanager
def scripted(tmp_path: Path, keys: str = "") -> Iterator[str]:
    from serve.config import Access, GatewaySettings, Served
    from serve.gateway import create_app

    def model(name: str, model_type: str, **how: Any) -> Served:
        return Served(name=name, model_type=model_type, policy=how.pop("policy", "text"), created=1, **how)

    models = [
        model("sums", "task_llm", example={"prompt": SUM}, max_tokens=48),
        model("translator", "translator", kind="task_llm"),
        model("extractor", "extractor"),
        model("vision", "multimodal_vision"),
        model("blind", "multimodal_vision"),
        model("scorer", "my_scorer", policy="ranking"),
    ]
    write_run(tmp_path / "out" / "first run")
    settings = GatewaySettings(
        models=models, runs=str(tmp_path / "out"), feedback=str(tmp_path / "f.jsonl"), access=Access(keys=keys)
    )
    with listening(create_app(settings, Scripted), keys=keys) as at:
        yield at


def opened(browser: Any, address: str, faults: list[str], **how: Any) -> Any:
    """The page under its own content security policy."""
    page = browser.new_page(**how)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    return page


def answered(page: Any) -> str:
    page.get_by_test_id("run").click()
    page.wait_for_selector("#after:not(:empty)")
    page.wait_for_selector("#stop[aria-disabled=true]")
    return page.get_by_test_id("result").inner_text()


def test_a_chat_has_turns_and_a_cut_off_answer_looks_cut_off(browser: Any, tmp_path: Path) -> None:
    faults: list[str] = []
    with scripted(tmp_path) as address:
        page = opened(browser, f"{address}/console", faults)
        page.wait_for_selector("option", state="attached")
        assert page.get_by_test_id("field-prompt").input_value() == SUM  # of the model's card
        assert not page.get_by_test_id("key").is_visible()
        assert SUM in answered(page) and page.get_by_test_id("cut-off").count() == 0
        facts = page.get_by_test_id("facts").inner_text()
        assert "finish reason: stop" in facts and "4 written" in facts and "tokens/s" in facts
        page.get_by_test_id("field-prompt").fill("And again")
        page.get_by_test_id("field-max_tokens").fill("5")
        answered(page)
        assert f"{SUM} |" in page.locator(".turn.answer").last.inner_text()  # the first turn was sent, too
        assert "5" in page.get_by_test_id("cut-off").inner_text()
        assert "finish reason: length" in page.get_by_test_id("facts").inner_text()
        page.get_by_test_id("raw").locator("summary").click()
        raw = json.loads(page.get_by_test_id("raw").locator("pre").inner_text())
        assert raw["choices"][0]["finish_reason"] == "length" and raw["usage"]["completion_tokens"] == 5
        page.get_by_test_id("new-conversation").click()
        assert page.locator(".turn").count() == 0
        page.get_by_test_id("model").select_option("translator")
        page.get_by_test_id("field-prompt").fill("guten Morgen")
        assert "guten Morgen" in answered(page) and "Calculate" not in page.get_by_test_id("result").inner_text()
        page.get_by_test_id("model").select_option("scorer")
        assert "No endpoint" in page.locator("#fields").inner_text()
        page.close()
    assert faults == []


def test_integers_are_whole_and_no_answer_says_why(browser: Any, tmp_path: Path) -> None:
    faults: list[str] = []
    with scripted(tmp_path) as address:
        page = opened(browser, f"{address}/console", faults)
        page.wait_for_selector("option", state="attached")
        page.get_by_test_id("model").select_option("extractor")
        page.get_by_test_id("field-schema").fill(
            json.dumps({"type": "object", "properties": {"big": {"maximum": 2**53 + 1}}})
        )
        page.get_by_test_id("code").locator("summary").click()
        page.get_by_test_id("code").locator("pre").first.wait_for()
        assert str(2**53 + 1) in page.get_by_test_id("code").inner_text()
        shown = answered(page)
        assert str(BIG) in shown and str(2**53 + 1) in shown and "Repaired" in shown
        page.get_by_test_id("raw").locator("summary").click()
        raw = json.loads(page.get_by_test_id("raw").locator("pre").inner_text())
        assert raw["data"] == ANSWERS["extractor"]["answer"]
        page.get_by_test_id("correction").fill(f'{{"big": {BIG}}}')
        page.get_by_test_id("correct").click()
        page.get_by_text("Recorded").wait_for()
        assert json.loads((tmp_path / "f.jsonl").read_text())["correction"] == {"big": BIG}
        for name, why in (("vision", "cut off"), ("blind", "wrote nothing")):
            page.get_by_test_id("model").select_option(name)
            shown = answered(page)
            assert "No answer" in shown and why in shown and page.locator("img").count() == 1
        page.close()
    assert faults == []


@pytest.mark.parametrize("model", ["sums", "extractor", "vision"])
def test_the_code_that_the_console_shows_works(browser: Any, tmp_path: Path, model: str) -> None:
    curl = shutil.which("curl") or pytest.skip("no curl here")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    text = 'it\'s "100%" \\\\n $HOME `date` é\n😀'
    with scripted(tmp_path) as address:
        page = opened(browser, f"{address}/console", [])
        page.wait_for_selector("option", state="attached")
        page.get_by_test_id("model").select_option(model)
        field = {"sums": "prompt", "extractor": "input", "vision": "question"}[model]
        page.get_by_test_id(f"field-{field}").fill(text)
        page.get_by_test_id("code").locator("summary").click()
        page.get_by_test_id("code").locator("pre").nth(1).wait_for()
        shown, python = page.get_by_test_id("code").locator("pre").all_text_contents()
        page.close()
        said = subprocess.run(
            ["bash", "-c", shown.replace("curl ", f"{curl} -s ", 1)], cwd=tmp_path, capture_output=True, timeout=60
        )
        found = json.loads(said.stdout)
        assert "error" not in found and found["model"] == model
        environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
        ran = subprocess.run(
            [sys.executable, "-c", python], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert ran.returncode == 0 and model in ran.stdout, ran.stderr
        if model == "sums":
            assert found["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("width", [390, 1280])
def test_load_and_runs_are_readable_at_each_width(browser: Any, tmp_path: Path, width: int) -> None:
    faults: list[str] = []
    with scripted(tmp_path) as address:
        page = opened(browser, f"{address}/console", faults, viewport={"width": width, "height": 844})
        page.wait_for_selector("option", state="attached")
        answered(page)
        page.get_by_test_id("tab-live").click()
        page.locator("#panel-live tfoot td").first.wait_for()
        cells = page.locator("#panel-live :is(td, th)").evaluate_all(
            "all => all.map(one => one.getBoundingClientRect().right)"
        )
        assert len(cells) > 40 and max(cells) <= width
        page.locator("#panel-live svg").first.hover()
        assert "a second" in page.locator("#panel-live svg .value").first.text_content()
        page.get_by_test_id("tab-runs").click()
        page.get_by_test_id("chart").first.wait_for()
        assert "kl: 0 at all 9 points" in page.get_by_test_id("run-card").inner_text()
        outside = "all => all.flatMap(one => [one.getBBox().x, 300 - one.getBBox().x - one.getBBox().width])"
        assert min(page.locator("[data-testid=chart] text").evaluate_all(outside)) >= 0
        page.get_by_test_id("chart").first.hover()
        assert "update 4:" in page.locator("[data-testid=chart] .value").first.text_content()
        page.screenshot(path=SHOTS / f"runs-{width}.png", full_page=True)
        with page.expect_popup() as found:
            page.get_by_test_id("report").click()
        found.value.get_by_text("the report").wait_for()
        assert found.value.title() == "sandboxed"
        found.value.close()
        page.close()
    assert faults == []


def test_a_key_is_asked_for_if_keys_are_on_and_opens_reports_too(browser: Any, tmp_path: Path) -> None:
    from serve import access

    faults: list[str] = []
    key = access.new_key(tmp_path / "keys.json", "one")
    with scripted(tmp_path, str(tmp_path / "keys.json")) as address:
        page = opened(browser, f"{address}/console", faults)
        page.get_by_test_id("door").wait_for()
        assert not page.get_by_test_id("model").is_visible() and not page.get_by_test_id("tab-try").is_visible()
        page.get_by_test_id("key").fill("srl-wrong")
        page.get_by_test_id("key").press("Enter")
        page.get_by_text("a valid API key is needed").wait_for()
        page.get_by_test_id("key").fill(key)
        page.get_by_test_id("key").press("Enter")
        page.get_by_test_id("model").wait_for()
        assert not page.get_by_test_id("key").is_visible() and SUM in answered(page)
        page.get_by_test_id("code").locator("summary").click()
        page.get_by_test_id("code").locator("pre").first.wait_for()
        assert "SRL_RLVR_KEY" in page.get_by_test_id("code").inner_text()
        assert key not in page.get_by_test_id("code").inner_text()
        page.get_by_test_id("tab-runs").click()
        with page.expect_popup() as found:
            page.get_by_test_id("report").click()
        frame = found.value.frame_locator("iframe")
        frame.get_by_text("the report").wait_for()
        assert found.value.frames[1].title() == "sandboxed"
        found.value.close()
        page.goto(f"{address}/docs")
        page.get_by_test_id("key").wait_for()  # kept in the tab
        form = page.get_by_test_id("POST /v1/extract")
        form.locator("summary").click()
        form.get_by_test_id("send").click()
        form.get_by_text("status 200").wait_for()
        assert str(BIG) in form.get_by_test_id("answer").inner_text()
        page.close()
    assert faults == []


def test_the_reference_needs_no_network_but_the_gateway(browser: Any, tmp_path: Path) -> None:
    faults: list[str] = []
    asked: list[str] = []
    with scripted(tmp_path) as address:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"{address}/docs")
        form = page.get_by_test_id("POST /v1/chat/completions")
        form.locator("summary").click()
        assert json.loads(form.get_by_test_id("body").input_value())["model"] == "sums"
        assert "messages" in form.inner_text() and not page.get_by_test_id("key").is_visible()
        assert page.locator("details").count() > 12
        assert page.evaluate_handle("document.documentElement.scrollWidth <= innerWidth").json_value()
        page.close()
    assert faults == [] and all(url.startswith((address, "data:")) for url in asked)
