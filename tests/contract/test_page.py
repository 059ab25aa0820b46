"""The page in a real browser: it renders, stays live, shows the pool's true numbers, and asks nobody but its server."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import pagemgr
from pagemgr.service import Server
from tests.serving import make_cache, run, use

pytestmark = pytest.mark.xdist_group("page")  # one browser for all of them

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def cache() -> pagemgr.PagedKVCache:
    cache = make_cache()
    use(cache)
    return cache


@pytest.fixture
def server(cache: pagemgr.PagedKVCache) -> Iterator[Server]:
    with cache.serve() as server:
        yield server


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page, waits until it is live, and at the end asks whether anything went wrong in it."""
    complaints: list[str] = []
    contexts = []

    def open_page(url: str, scheme: str = "light", size: dict[str, int] = DESKTOP) -> Any:
        contexts.append(browser.new_context(color_scheme=scheme, viewport=size))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: page.asked.append(request.url))
        page.asked = []
        page.goto(url)
        page.wait_for_selector("#live[data-state=live]", timeout=15_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def text(page: Any, selector: str) -> str:
    return str(page.inner_text(selector))


def cells(page: Any, table: str) -> list[list[str]]:
    return [row.split("\t") for row in text(page, f"#{table} tbody").splitlines()]


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert holds()


def test_it_shows_the_true_numbers(cache: pagemgr.PagedKVCache, server: Server, visit: Callable[..., Any]) -> None:
    page, stats = visit(server.url), cache.stats()
    device = stats.device
    assert text(page, "#utilization dd") == f"{100 * device.utilization:.1f} %" == "7.7 %"
    available = (device.free + device.cached) * cache.layout.block_bytes
    assert text(page, "#available dd") == f"{available / 1024:.1f} KiB"
    assert text(page, "#saved dd") == f"{device.saved * cache.layout.block_bytes / 1024:.1f} KiB"
    assert text(page, "#invariants dd") == "hold"
    assert "4 of 32 sequences live" in text(page, "#saved")
    shown = {state: int(text(page, f"#legend b[data-state={state}]")) for state in ("full", "open", "cached", "free")}
    assert shown == {state: getattr(device, state) for state in shown}
    assert [row[3] for row in cells(page, "sequences")] == ["10", "10", "10", "5"]
    assert cells(page, "prefixes")[0][2:4] == ["3", "10"]
    assert [row[:2] for row in cells(page, "tiers")] == [["device", "ok"], ["host", "ok"]]
    assert "1 sequences" in text(page, "#pressure")
    page.locator("#events").scroll_into_view_if_needed()
    until(lambda: "No event since you came" in text(page, "#events"))
    page.click("summary")
    assert '"max_sequences": 32' in text(page, "#config")


def test_it_follows_the_pool_and_notices_its_end(
    cache: pagemgr.PagedKVCache, server: Server, visit: Callable[..., Any]
) -> None:
    page = visit(server.url)
    points = page.evaluate("curves.points.length")
    sequence = cache.add()
    run(cache, sequence, list(range(60)))
    with pytest.raises(pagemgr.OutOfBlocks):
        cache.manager.reserve(cache.manager.add_many([()] * 20), [[1] * 30] * 20)
    until(lambda: text(page, "#utilization dd") == f"{100 * cache.stats().device.utilization:.1f} %" == "46.2 %")
    until(lambda: page.evaluate("curves.points.length") > points)
    assert text(page, "#refused dd") == "1"
    assert page.get_attribute("#refused", "data-mood") == "warn"
    cache.manager.counters.invariant_violations = 2
    until(lambda: text(page, "#invariants dd") == "broken")
    assert page.evaluate("curves.points.at(-1).utilization") == pytest.approx(cache.stats().device.utilization)
    page.locator("#events").scroll_into_view_if_needed()
    until(lambda: "No event since you came" in text(page, "#events"))
    cache.clear()
    until(lambda: "removed\tcleared\tdevice\t1" in text(page, "#events"))
    legend = text(page, "#ratios .u-legend")
    assert "46.2 %" in legend  # of the newest point, while the pointer is elsewhere


def test_it_says_when_nobody_answers(cache: pagemgr.PagedKVCache, browser: Any) -> None:
    server = cache.serve()
    page = browser.new_page()
    try:
        page.goto(server.url)
        page.wait_for_selector("#live[data-state=live]")
        server.close()
        page.wait_for_selector("#live[data-state=lost]", timeout=15_000)
        assert text(page, "#live").startswith("no answer at ")
        with cache.serve(port=server.port):
            page.wait_for_selector("#live[data-state=live]", timeout=15_000)
    finally:
        server.close()
        page.close()


def test_the_map_has_the_colour_of_each_block(
    cache: pagemgr.PagedKVCache, server: Server, visit: Callable[..., Any]
) -> None:
    run(cache, cache.add(), list(range(200, 208)))
    page = visit(server.url)
    state, refs = cache.manager.tiers[0].pool.state, cache.manager.tiers[0].pool.refs
    painted = page.evaluate("""() => {
        const map = maps.get("device"), context = map.canvas.getContext("2d"), ratio = window.devicePixelRatio;
        return Array.from({length: 40}, (_, i) => Array.from(context.getImageData(
            ratio * ((i % map.columns) * map.side + map.side / 2),
            ratio * (Math.floor(i / map.columns) * map.side + map.side / 2), 1, 1).data));
    }""")
    colours: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for block in range(40):
        colours.setdefault((int(state[block]), int(refs[block])), set()).add(tuple(painted[block]))
    assert all(len(same) == 1 for same in colours.values()), colours
    assert len(colours) == 6  # null, free and cached; full of one; open and full of three
    assert len(set.union(*colours.values())) == 6
    page.hover("canvas[data-tier=device]", position={"x": 3, "y": 3})
    assert text(page, "#tip") == "block 0: null\nreferences: 0"
    assert "3 cached" in page.get_attribute("canvas[data-tier=device]", "aria-label")


def test_a_million_blocks_are_live_and_do_not_flicker(visit: Callable[..., Any]) -> None:
    cache = make_cache(num_blocks=1_000_000)
    sequences = cache.add_many([()] * 20)
    with cache.serve() as server:
        page = visit(server.url)
        assert "245 blocks a cell" in text(page, "#maps figcaption >> nth=0")
        # Every frame for two seconds: a cell in the middle is never empty, and the canvas never changes its size.
        page.evaluate("""() => {
            const map = maps.get("device"), context = map.canvas.getContext("2d"), size = map.canvas.height;
            window.seen = {frames: 0, empty: 0, draws: 0};
            const draw = map.draw.bind(map);
            map.draw = () => { seen.draws += 1; draw(); };
            const look = () => {
                const alpha = context.getImageData(map.side / 2, map.side / 2, 1, 1).data[3];
                seen.frames += 1;
                if (alpha !== 255 || map.canvas.height !== size) seen.empty += 1;
                requestAnimationFrame(look);
            };
            look();
        }""")
        for step in range(4):
            tokens = np.arange(320).reshape(20, 16) + 320 * step
            cache.manager.commit(cache.manager.reserve(sequences, tokens.astype(np.int32)))
            time.sleep(0.5)
        until(lambda: text(page, "#legend b[data-state=full]") == "320")
        seen = page.evaluate("seen")
    assert seen["frames"] > 10
    assert seen["draws"] >= 2
    assert seen["empty"] == 0


@pytest.mark.parametrize(("scheme", "size"), [("light", PHONE), ("dark", DESKTOP)])
def test_it_fits_and_follows_the_scheme(
    cache: pagemgr.PagedKVCache, server: Server, visit: Callable[..., Any], scheme: str, size: dict[str, int]
) -> None:
    page = visit(server.url, scheme, size)
    page.locator("#events").scroll_into_view_if_needed()
    until(lambda: "No event since you came" in text(page, "#events"))
    run(cache, cache.add(), list(range(300, 340)))
    cache.clear()
    until(lambda: "computed" in text(page, "#events"))
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    for part in ("#utilization", "#ratios canvas", "#causes canvas", "#maps canvas", "#sequences", "#events"):
        box = page.locator(part).first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size["width"]
    background, ink = (
        sum(map(int, page.evaluate(f"getComputedStyle(document.body).{of}").strip("rgb()").split(",")))
        for of in ("backgroundColor", "color")
    )
    assert (background < 100 < 600 < ink) if scheme == "dark" else (ink < 200 < 650 < background)


def test_it_asks_nobody_else(server: Server, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    root = server.url.removesuffix("ui")
    assert page.asked
    assert {url for url in page.asked if not url.startswith((root, "data:"))} == set()


def test_the_browser_runs_nothing_but_the_page(server: Server, browser: Any) -> None:
    page = browser.new_page()
    page.goto(server.url)
    blocked = page.evaluate("""() => new Promise((resolve) => {
        document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "window.injected = true";
        document.body.append(script);
        setTimeout(() => resolve("nothing"), 2000);
    })""")
    assert blocked == "script-src-elem"
    assert page.evaluate("window.injected") is None
    page.close()
