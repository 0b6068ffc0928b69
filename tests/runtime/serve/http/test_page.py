"""The demo page in headless Chromium, against the whole server. Chromium is Debian's package; without it these tests skip."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image

from stepforge import Control, Request
from stepforge.runtime.load import load
from stepforge.runtime.serve.http.app import create_app
from stepforge.runtime.serve.http.models import Model

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
]

KEY = "0123456789abcdef0123"
FLAGS = [  # --no-sandbox: root has no user namespace; the rest asks nothing of hosts of Chromium's own
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
WATCH = """() => {
  window.previews = 0; window.bars = new Set();
  new MutationObserver(() => { if (picture.classList.contains("partial")) window.previews += 1; })
    .observe(picture, { attributes: true });
  const bar = document.getElementById("progress");
  new MutationObserver(() => window.bars.add(bar.value)).observe(bar, { attributes: true });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def listening(service: Any) -> Iterator[str]:
    """The service on a port of loopback; its address."""
    config = uvicorn.Config(create_app(service), host="127.0.0.1", port=0, log_config=None, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


class Opened:
    """A page, and what its browser complained of."""

    def __init__(self, page: Any) -> None:
        self.page, self.complaints = page, []
        page.on(
            "console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}"))
        page.set_default_timeout(20_000)

    def generate(self) -> tuple[dict[str, Any], Image.Image]:
        """Press the button; what was sent, and the picture that came."""
        page = self.page
        with page.expect_request("**/v1/images/generations") as asked:
            page.click("#go")
        page.wait_for_selector("#go:not([disabled])")
        assert page.is_hidden("#error"), page.inner_text("#error")
        return asked.value.post_data_json, opened(page.get_attribute("#picture", "src"))


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))).convert("RGB")


@pytest.fixture
def open_page(browser: Any, serving: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Open the page of a service on a port of its own: `open_page(running)`."""
    with contextlib.ExitStack() as stack:

        def start(running: Any) -> Opened:
            address = stack.enter_context(listening(running.service))
            context = browser.new_context(viewport={"width": 1180, "height": 1100})
            stack.callback(context.close)
            found = Opened(context.new_page())
            found.page.goto(address)
            return found

        yield start


def test_a_request_of_the_page_is_drawn_as_the_engine_draws_it(serving, open_page, adapter_folder):
    running = serving(keys=[f"{KEY} tester admin"], adapter_folder=adapter_folder)
    engine = running.service.models.engines()[0]
    engine.adapters.load("good", adapter_folder / "good.safetensors")
    seen = open_page(running)
    page = seen.page
    page.wait_for_selector("#error:not([hidden])")
    assert "API key" in page.inner_text("#error")
    assert any("401" in text for text in seen.complaints)
    seen.complaints.clear()
    page.fill("#key", KEY)
    page.press("#key", "Tab")
    page.wait_for_selector("[data-adapter=good]")
    assert page.is_hidden("#error")
    assert page.input_value("#width") == "64"
    assert page.is_hidden("#control-part")
    prompt = "<img src=x onerror=alert(1)> \u2603"
    page.fill("#prompt", prompt)
    page.fill("#negative", "a dog")
    page.fill("#seed", "7")
    page.fill("#steps", "6")
    page.fill("#height", "96")
    page.click("text=ramp")
    page.locator("[data-adapter=good]").fill("0.75")
    page.select_option("#upscale", "nearest")
    page.evaluate(WATCH)
    sent, image = seen.generate()
    assert sent == {
        "model": "fake", "prompt": prompt, "negative_prompt": "a dog", "steps": 6, "seed": 7, "size": "64x96",
        "guidance": "linear(1..3)", "adapters": {"good": 0.75}, "upscale": [{"name": "nearest"}], "stream": True,
        "partial_images": 3, "progress": True, "output_format": "png",
    }  # fmt: skip
    asked = Request(
        prompt=prompt, negative="a dog", steps=6, seed=7, width=64, height=96, guidance="linear(1..3)",
        adapters={"good": 0.75}, upscale="nearest",
    )  # fmt: skip
    assert np.array_equal(np.asarray(image), np.asarray(engine.generate(asked).images[0]))
    assert page.evaluate("window.previews") >= 1
    assert page.evaluate("window.bars.size") >= 3
    assert "seed 7 · " in page.inner_text("#meta")
    assert prompt in page.inner_text("#meta")
    assert page.locator("#history button").count() == 1
    assert not seen.complaints


def weights(engine: Any, text: str, steps: int) -> list[float]:
    return [step.guidance for step in engine.plan(Request(prompt="", steps=steps, guidance=text)).steps]


def drag(page: Any, index: int, dx: float, dy: float) -> None:
    box = page.locator("#curve .handle").nth(index).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx / 2, y + dy / 2)
    page.mouse.move(x + dx, y + dy)
    page.mouse.up()


def points(page: Any) -> np.ndarray:
    """Of the curve's handles, [n, 2]: place in 0..1, weight."""
    texts = [handle.get_attribute("aria-valuetext") for handle in page.locator("#curve .handle").all()]
    return np.array([[float(number) for number in text.split(" at ")][::-1] for text in texts])


def test_the_curve_is_the_plan_that_runs(serving, open_page):
    running = serving()
    engine = running.service.models.engines()[0]
    page = (seen := open_page(running)).page
    page.wait_for_selector("#model option", state="attached")
    page.fill("#steps", "10")
    assert page.input_value("#guidance") == "3"
    page.click("text=cosine")
    assert page.input_value("#guidance") == "cosine(1.5)"
    page.click("button:text('constant')")
    box = page.locator("#curve").bounding_box()
    page.mouse.click(box["x"] + 0.4 * box["width"], box["y"] + 0.2 * box["height"])  # a third point
    drag(page, 0, 0, 20)
    drag(page, 1, 40, -10)
    drawn = points(page)
    assert len(drawn) == 3
    assert drawn[1, 1] > 5 > 3 > drawn[0, 1]
    sent, _ = seen.generate()
    expected = np.interp(np.arange(10) / 9, *drawn.T)
    np.testing.assert_allclose(weights(engine, sent["guidance"], 10), expected, atol=0.0051)  # two decimals
    page.locator("#curve .handle").nth(1).press("ArrowUp")
    assert points(page)[1, 1] == drawn[1, 1] + 0.25
    page.locator("#curve .handle").nth(1).press("Delete")
    assert len(points(page)) == 2
    page.click("text=interval")
    drag(page, 1, 0, -30)
    steps = points(page)
    expected = [steps[steps[:, 0] <= k / 10 + 1e-9][-1, 1] for k in range(10)]
    text = page.input_value("#guidance")
    assert re.fullmatch(r"1@0-0\.2,[\d.]+@0\.2-0\.7,1@0\.7-1", text)
    assert weights(engine, text, 10) == expected
    page.fill("#guidance", "interval(7.5")
    page.click("#go")
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error").startswith("guidance: ")
    assert page.is_enabled("#go")


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def asked_of(sent: dict[str, Any], control: Control) -> Request:
    """What the page asked for, in the engine's words."""
    width, height = map(int, sent["size"].split("x"))
    return Request(
        prompt=sent["prompt"], steps=sent["steps"], seed=sent["seed"], guidance=sent["guidance"], width=width,
        height=height, controls=[control],
    )  # fmt: skip


def test_a_sketch_becomes_the_hint_of_a_controlnet(serving, open_page, tiny_sd1_control_bundle):
    running = serving()
    model = Model("tiny", lambda: load(tiny_sd1_control_bundle, backend="onnxruntime"))
    model.engine = model.loader()
    with model.engine as engine:
        running.service.models.models["tiny"] = model
        page = (seen := open_page(running)).page
        page.wait_for_selector("#model option >> nth=1", state="attached")
        page.select_option("#model", "tiny")
        page.check("#control-on")
        page.select_option("#control-name", "a")
        page.fill("#steps", "2")
        box = page.locator("#pad").bounding_box()
        corners = [(0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75)]
        spots = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
        page.mouse.move(*spots[0])
        page.mouse.down()
        for spot in spots[1:]:
            page.mouse.move(*spot)
        page.mouse.up()
        sent, image = seen.generate()
        (control,) = sent["controls"]
        hint = opened(control["image"])
        white = np.asarray(hint)[..., 0] > 127
        assert white[80:176, 80:176].all()
        assert not white[:50].any()
        assert not white[:, 210:].any()
        control = Control(name="a", image=base64.b64decode(control["image"].partition(",")[2]))
        assert np.array_equal(np.asarray(image), np.asarray(engine.generate(asked_of(sent, control)).images[0]))
        page.click("#clear")
        assert not np.array_equal(np.asarray(seen.generate()[1]), np.asarray(image))
        page.click("#undo")
        assert np.array_equal(np.asarray(seen.generate()[1]), np.asarray(image))
        picture = np.full((64, 128, 3), (250, 240, 10), np.uint8)
        picture[16:48, 48:80] = (10, 20, 250)
        files = [
            {"name": "x.png", "mimeType": "image/png", "buffer": png(picture)},
            {"name": "x.png", "mimeType": "", "buffer": b"x"},
        ]
        page.set_input_files("#file", files[:1])
        until = time.monotonic() + 20
        while page.evaluate("pad.getContext('2d').getImageData(0, 0, 1, 1).data[0]") != 250:
            assert time.monotonic() < until
        page.select_option("#preprocessor", "silhouette")
        sent, drawn = seen.generate()
        kept = np.asarray(opened(sent["controls"][0]["image"]))
        assert (kept[0, 0] == (250, 240, 10)).all()  # the picture covers the pad
        assert (kept[128, 128] == (10, 20, 250)).all()
        control = Control(name="a", image=png(kept), preprocessor="silhouette")
        expected = engine.generate(asked_of(sent, control)).images[0]
        assert np.array_equal(np.asarray(drawn), np.asarray(expected))
        page.set_input_files("#file", files[1:])
        page.wait_for_selector("#error:not([hidden])")
        assert "x.png cannot be read" in page.inner_text("#error")
        assert not seen.complaints


def test_errors_and_the_stop_button(serving, open_page):
    running = serving(queue_limit=1)
    backend = running.backends["fake"]
    page = (seen := open_page(running)).page
    page.wait_for_selector("#model option", state="attached")
    backend.gate.clear()
    engine = running.service.models.engines()[0]
    first = engine.submit("a", steps=2)
    until = time.monotonic() + 20
    while not backend.calls:  # it runs, and no longer waits
        assert time.monotonic() < until
        time.sleep(0.01)
    second = engine.submit("b", steps=2)
    page.click("#go")
    page.wait_for_selector("#error:not([hidden])")
    assert re.search(r"try again in \d+ s", page.inner_text("#error"))
    second.cancel()
    first.cancel()
    backend.gate.set()
    seen.generate()
    backend.gate.clear()
    page.click("#go")
    page.wait_for_selector("#stop:not([disabled])")
    while not running.service.under_way:
        time.sleep(0.01)
    page.click("#stop")
    page.wait_for_selector("#meta:text('stopped')")
    backend.gate.set()
    until = time.monotonic() + 20
    while running.service.under_way:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert page.is_hidden("#error")


def test_files_of_the_page_are_named_nowhere_else(serving):
    """What the page asks for is its own; nothing is fetched from other hosts, and no script or style stands in the HTML."""
    folder = Path(__file__).parents[4] / "runtime/serve/http/page"
    client = serving(keys=[KEY]).client
    for path in (path for path in folder.iterdir() if path.suffix in (".html", ".js", ".css")):
        answer = client.get("/" if path.name == "index.html" else f"/{path.name}")
        assert answer.status_code == 200
        assert answer.content == path.read_bytes()
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
        assert "innerHTML" not in text
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon[a-z]+=", html)
