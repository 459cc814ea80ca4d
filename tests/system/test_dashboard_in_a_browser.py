"""The dashboard in a real browser, in front of real processes."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import example_trace
import pytest
from chromium import CONTRAST, Browser, chromium

from mesh.bus import BusOptions
from mesh.client import MeshClient
from mesh.gateway import GatewaySettings, HttpEdge
from mesh.gateway.dashboard import watch
from mesh.http.listener import ListenerOptions
from mesh.http.tokens import Issuer, Verifier
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.local.nats_server import NatsServer
from mesh.telemetry.views.document import looked_at

ESCAPE, ENTER, TAB = "\ue00c", "\ue007", "\ue004"
SERVING = "document.documentElement.dataset.standing === 'ready'"
VIEWS = ("mesh", "playground", "requests")


@pytest.fixture(scope="module")
def _chromium() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def browser(_chromium: Browser) -> Iterator[Browser]:
    """A page of a fresh tab; at the end nothing may stand in its console that should not."""
    _chromium.open("about:blank")
    _chromium.errors()
    _chromium.emulate()
    yield _chromium
    said = [line for line in _chromium.errors() if "ERR_CONNECTION_REFUSED" not in line and "status of 40" not in line]
    assert said == []


@contextmanager
def gateway(url: str, *, port: int = 0, verifier: Verifier | None = None) -> Iterator[HttpEdge]:
    """An HTTP edge in a thread of its own."""
    edge = HttpEdge.bind(GatewaySettings(listener=ListenerOptions(port=port), verifier=verifier))
    loops: queue.Queue[asyncio.AbstractEventLoop] = queue.Queue()

    async def serve() -> None:
        loops.put(asyncio.get_running_loop())
        await edge.serve(BusOptions(urls=(url,)))

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="gateway")
    thread.start()
    try:
        yield edge
    finally:
        loops.get().call_soon_threadsafe(edge.stop)
        thread.join()


def page(browser: Browser, mesh: LocalMesh, view: str = "mesh") -> None:
    browser.open("about:blank")
    browser.open(f"{mesh.http_urls[0]}/#{view}")
    browser.until(SERVING)


def test_the_mesh_is_drawn_as_it_is(mesh: LocalMesh, browser: Browser) -> None:
    page(browser, mesh)
    browser.until("document.querySelectorAll('.card.is-ready').length === 2")
    assert browser.js("return [...document.querySelectorAll('.card .card-name')].map(e => e.textContent)") == ["shard-1", "shard-2"]
    assert browser.js("return [...document.querySelectorAll('.label-main')].map(e => e.textContent)") == ["Layers 0–2", "Layers 2–3"]
    assert browser.js("return document.querySelector('#state').textContent").strip() == "Serving"
    assert browser.js("return document.querySelector('#mesh-title').textContent") == "tiny"
    assert "2 layer ranges" in browser.js("return document.querySelector('.picture svg').getAttribute('aria-label')")
    rows = browser.js("return [...document.querySelectorAll('#shards tr')].map(r => r.innerText.split('\\t').slice(0, 4))")
    assert [row[:3] for row in rows] == [["shard-1", "0–2", "ready"], ["shard-2", "2–3", "ready"]]


def test_a_request_is_seen_and_its_time_is_laid_out(mesh: LocalMesh, browser: Browser) -> None:
    page(browser, mesh, "requests")
    with MeshClient(mesh.url, model="tiny") as client:
        done = client.generate(tokens=[5, 17, 33], max_tokens=30, ignore_eos=True)
    browser.until("document.querySelector(`#requests a[href$='${arguments[0]}']`)", done.request)
    browser.js("document.querySelector(`#requests a[href$='${arguments[0]}']`).click()", done.request)
    browser.until("document.querySelectorAll('#trace .stairs tbody tr').length === 3")  # two stages, and the way back
    said = browser.js("return document.querySelector('#trace').innerText")
    assert "3 prompt tokens" in said and "30 tokens" in said and "mean of 29" in said
    assert browser.js("return [...document.querySelectorAll('.stage-name')].map(e => e.textContent)") == ["shard-1", "shard-2"]
    # the parts of the staircase follow one another and fill the step
    ends = browser.js(
        "const lanes = [...document.querySelectorAll('.lane-in')].map(e => e.getBoundingClientRect());"
        "const bars = [...document.querySelectorAll('.lane-in .bar')].map(e => e.getBoundingClientRect());"
        "return [bars[0].left - lanes[0].left, lanes[0].right - bars[bars.length - 1].right, bars.map(b => b.left)]"
    )
    assert abs(ends[0]) < 2 and abs(ends[1]) < 4 and ends[2] == sorted(ends[2])
    with MeshClient(mesh.url, model="tiny") as client:
        trace = client.inspect(done.request) or {}
    sums = [span["attributes"]["mesh.steps"] for span in trace["spans"] if span["name"] == "decode steps"]
    alone = browser.js("return document.querySelectorAll('.step').length")
    assert alone >= 24 and alone + sum(sums) == 29, "every step is there, alone or in a sum"
    assert browser.js("return document.querySelector('.bound').innerText").startswith("Bound by ")
    browser.js("document.querySelector('.step:last-child').focus()")
    browser.keys("\ue012")  # the step before, with the left arrow
    browser.until("document.querySelector('.step:nth-last-child(2).chosen')")
    assert "after the request came" in browser.js("return document.querySelector('.stairs caption').innerText")


class Clock:
    """The clocks of `time`, `ahead_s` seconds ahead."""

    ahead_s = 0.0

    def time(self) -> float:
        return time.time() + self.ahead_s

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


FEED = "import('/dashboard/static/feed.js').then(feed => window.feed = feed.state)"
SEEN = "window.feed?.snapshot?.at_unix_s"


@pytest.mark.parametrize("away_s", [130, 170, 600], ids=["two-minutes", "three-minutes", "ten-minutes"])
def test_a_page_that_is_idle_for_minutes_goes_on(mesh: LocalMesh, browser: Browser, monkeypatch: pytest.MonkeyPatch, away_s: int) -> None:
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    with gateway(mesh.url) as edge:
        browser.open(edge.url)
        browser.until(SERVING)
        browser.js(FEED)
        with MeshClient(mesh.url, model="tiny") as client:
            client.generate(tokens=[5, 17, 33], max_tokens=10, ignore_eos=True)
        browser.until("window.feed?.series.tiny?.filter(point => point[2] !== null).length >= 2")  # the chart of first tokens is drawn
        assert browser.js("return document.querySelector('.figure-first .spark-line').getAttribute('d')")
        clock.ahead_s = away_s
        later = time.time() + away_s - 10
        browser.until(f"{SEEN} > arguments[0]", later)
        seen = browser.js(f"return {SEEN}")
        browser.until(f"{SEEN} > arguments[0] + 1", seen)  # the feed goes on
        assert browser.js("return document.querySelector('#state').innerText").strip() == "Serving"
        assert browser.js("return document.querySelector('#notice').hidden")
        assert browser.js("return document.querySelector('.figure-first .spark-line').getAttribute('d')") is None


def test_a_view_that_fails_ends_neither_the_feed_nor_the_others(mesh: LocalMesh, browser: Browser) -> None:
    page(browser, mesh)
    browser.js(FEED)
    browser.js(
        "import('/dashboard/static/charts.js').then("
        " m => { m.Spark.prototype.draw = () => { throw new Error('a chart') }; window.broken = 1 })"
    )
    browser.until("window.broken && !document.querySelector('#notice').hidden")
    assert "the figures (a chart)" in browser.js("return document.querySelector('#notice').innerText")
    seen = browser.js(f"return {SEEN}")
    browser.until(f"{SEEN} > arguments[0] + 2", seen)
    assert browser.js("return document.querySelector('#state').innerText").strip() == "Serving"
    said = browser.errors()
    assert len(said) == 1 and "the figures could not be drawn" in said[0], "once, not each second"


def draw(browser: Browser, document: dict[str, Any]) -> None:
    """Let the page draw a trace document."""
    browser.js(
        "const [trace] = arguments; window.drawn = false; import('/dashboard/static/waterfall.js').then(m => {"
        " document.querySelector('#trace').replaceChildren(m.waterfall(trace)); window.drawn = true; })",
        document,
    )
    browser.until("window.drawn")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_failover_and_the_time_inside_the_server_are_visible(mesh: LocalMesh, browser: Browser, width: int, dark: bool) -> None:
    browser.emulate(width=width, dark=dark, phone=width < 500)
    page(browser, mesh, "requests")
    draw(browser, looked_at(example_trace.document(skew_ns={"shard-2": 2 * 10**9})))
    said = browser.js("return document.querySelector('#trace').innerText")
    assert "Bound by compute: 61\u00a0% of 516 ms" in said and "The clock of shard-2 is about 2 s ahead" in said
    assert "Moved from shard-2 to shard-2b after" in said and "without a route, then the history was computed again" in said
    parts = browser.js(
        "return [...document.querySelectorAll('.life-part')].map(e => [e.className.split(' ')[1], e.getBoundingClientRect().left])"
    )
    lost = next(left for kind, left in parts if kind == "is-failover")
    assert max(left for kind, left in parts if kind == "is-prefill") > lost, "the replay follows the loss"
    assert browser.js("return document.querySelectorAll('.steps > .step').length") == 6
    assert browser.js("return [...document.querySelector('.steps').children].findIndex(e => e.className === 'step-lost')") == 3
    browser.js("document.querySelector('.steps > .step').click()")  # of the first route, with a server's report
    assert browser.js("return [...document.querySelectorAll('.stage-name')].map(e => e.textContent)") == ["shard-1", "shard-2", "shard-3"]
    kinds = browser.js(
        "return [...document.querySelector('.stairs tbody tr').querySelectorAll('.bar')].map(e => e.className.split(' ')[1])"
    )
    assert kinds == ["is-hop", "is-server", "is-codec", "is-queue", "is-compute", "is-codec"]
    lefts = browser.js(
        "const left = e => e.getBoundingClientRect().left;"
        "return [...document.querySelectorAll('.lane-in')].map(lane => [...lane.querySelectorAll('.bar')].map(left))"
    )
    assert [min(lane) for lane in lefts] == sorted(min(lane) for lane in lefts), "each stage begins after the one before it"
    assert "from c1 to shard-1): 1.00 ms" in browser.js("return document.querySelector('.bar.is-hop').title")
    assert browser.js("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.js(CONTRAST) == []


def test_the_playground_shows_each_token_as_it_comes(mesh: LocalMesh, browser: Browser) -> None:
    page(browser, mesh, "playground")
    browser.js("document.querySelector('#set-max').value = 24")
    browser.js(
        "window.seen = new Set(); new MutationObserver(() => window.seen.add(document.querySelector('.words')?.textContent))"
        ".observe(document.querySelector('#messages'), {childList: true, subtree: true, characterData: true})"
    )
    browser.keys("/")
    browser.until("document.activeElement.id === 'prompt'")
    browser.keys("Rain?", ENTER)
    browser.until("document.querySelector('.from-model') && !document.querySelector('.writing')")
    words = browser.js("return document.querySelector('.words').textContent")
    assert words and browser.js("return document.querySelector('.from-user').innerText") == "Rain?"
    assert len(browser.js("return [...window.seen]")) >= 5, "it came in one lump"
    note = browser.js("return document.querySelector('.from-model .note').innerText")
    assert "24 tokens" in note and "first after" in note and "most tokens" in note
    browser.until("document.querySelector('.where summary')")
    browser.js("document.querySelector('.where summary').click()")
    browser.until("document.querySelectorAll('.where .stairs tbody tr').length === 3")
    browser.keys("x" * 80, ENTER)  # more than a row holds: said where the answer would be, and the conversation goes on
    browser.until("document.querySelector('.failed .note')?.innerText.includes('rows here hold')")
    browser.js("document.querySelector('#new-chat').click()")
    assert browser.js("return document.querySelectorAll('.message').length") == 0


def test_everything_is_reached_from_the_keyboard(mesh: LocalMesh, browser: Browser) -> None:
    page(browser, mesh)
    browser.keys(TAB)
    assert browser.js("return document.activeElement.id") == "skip"
    browser.keys(ENTER)
    assert browser.js("return document.activeElement.id") == "main"
    for key, view in zip("231", ("playground", "requests", "mesh"), strict=True):
        browser.keys(key)
        browser.until("!document.querySelector(`#view-${arguments[0]}`).hidden", view)
        assert browser.js("return document.querySelector('nav [aria-current]').dataset.view") == view
    browser.keys("?")
    browser.until("document.querySelector('#help-dialog').open")
    browser.keys(ESCAPE)
    browser.until("!document.querySelector('#help-dialog').open")
    seen = []
    for _ in range(3):
        browser.keys("t")
        seen.append(browser.js("return document.documentElement.dataset.theme"))
    assert sorted(seen) == ["auto", "dark", "light"]
    browser.keys("/")
    browser.until("document.activeElement.id === 'prompt'")
    browser.keys("1t?")  # into the message, not to the page
    assert browser.js("return document.querySelector('#prompt').value") == "1t?"
    unnamed = browser.js(
        "return [...document.querySelectorAll('button, a, input, select, textarea')].filter(e => !(e.innerText.trim() ||"
        " e.getAttribute('aria-label') || (e.labels && e.labels.length))).map(e => e.outerHTML)"
    )
    assert unnamed == []
    for view in VIEWS:
        page(browser, mesh, view)
        regions = browser.js(
            "const name = e => e.getAttribute('aria-label') || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent;"
            "return [...document.querySelectorAll('section, nav, [role=region]')].filter(e => e.offsetParent).map(name)"
        )
        assert all(regions) and len(regions) == len(set(regions)), regions
        unreached = browser.js(
            "const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowY) && e.scrollHeight > e.clientHeight;"
            "return [...document.querySelectorAll('main *')].filter(e => e.offsetParent && scrolls(e) && e.tabIndex < 0)"
            ".map(e => e.outerHTML.slice(0, 80))"
        )
        assert unreached == [], "what scrolls is reached with the keyboard"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_view_fits_and_can_be_read(mesh: LocalMesh, browser: Browser, width: int, dark: bool) -> None:
    browser.emulate(width=width, dark=dark, phone=width < 500)
    with MeshClient(mesh.url, model="tiny") as client:
        done = client.generate(tokens=[5, 17, 33], max_tokens=10, ignore_eos=True)
    for view in (*VIEWS, f"requests/{done.request}"):
        page(browser, mesh, view)
        if "/" in view:
            browser.until("document.querySelector('#trace .stairs')")
        assert browser.js("return document.documentElement.scrollWidth <= innerWidth"), f"{view} is wider than the page"
        assert browser.js(CONTRAST) == [], view
    browser.js("document.documentElement.style.setProperty('--muted', 'light-dark(#c8c8c8, #404040)')")
    assert browser.js(CONTRAST), "the check finds nothing, whatever the colours"


def test_nothing_moves_where_motion_is_not_wanted(mesh: LocalMesh, browser: Browser) -> None:
    browser.emulate(still=True)
    page(browser, mesh)
    assert browser.js("return getComputedStyle(document.querySelector('.card')).transitionDuration") == "0s"
    browser.keys("2")
    browser.until("document.querySelector('.writing') === null")


def test_a_lost_shard_is_shown_and_its_place_taken(model: Path, browser: Browser) -> None:
    with LocalMesh(LocalOptions(model=model, shards=2, replicas=2, rows=4, context=64)) as pairs:
        page(browser, pairs)
        browser.until("document.querySelectorAll('.card.is-ready').length === 4")
        pairs.processes["shard-1"].kill()
        browser.until("document.querySelector('.card.is-lost .card-name')?.textContent === 'shard-1'")
        state = browser.until("document.documentElement.dataset.standing === 'degraded' && document.querySelector('#state').innerText")
        assert "shard-1 is lost" in state and "carry on" in state
        pairs.processes["shard-2"].kill()  # the other replica: nobody holds these layers now
        state = browser.until("document.documentElement.dataset.standing === 'down' && document.querySelector('#state').innerText")
        assert "No shard holds layers 0-2" in state
        browser.keys("2")  # and the other views say so too
        browser.until("!document.querySelector('#notice').hidden && document.querySelector('#notice').innerText.includes('0-2')")


def test_the_page_reports_a_lost_gateway_and_finds_it_again(model: Path, browser: Browser) -> None:
    with LocalMesh(LocalOptions(model=model, shards=1, rows=4, context=64, http=False)) as mesh:
        with gateway(mesh.url) as edge:
            url = edge.url
            browser.open(url)
            browser.until(SERVING)
        state = browser.until("document.documentElement.dataset.standing === 'down' && document.querySelector('#state').innerText")
        assert "does not answer" in state
        assert browser.js("return document.querySelectorAll('.card').length") == 1, "what was seen stays"
        with gateway(mesh.url, port=int(url.rpartition(":")[2])):
            browser.until(SERVING)


def test_a_token_is_asked_for_where_one_is_needed_and_kept_in_the_tab(mesh: LocalMesh, browser: Browser) -> None:
    secret = b"s" * 32
    with gateway(mesh.url, verifier=Verifier("HS256", secret)) as edge:
        browser.open(edge.url)
        browser.until("document.querySelector('#token-dialog').open")
        issue = Issuer("HS256", secret).issue
        for scope in ("generate", "admin"):
            browser.until("document.activeElement.id === 'token'")
            browser.keys(issue("me", [scope], now_unix_s=time.time(), expiry_s=600), ENTER)
            if scope == "generate":
                browser.until("document.querySelector('#token-dialog').open")
                browser.until("document.querySelector('#token-why').innerText.includes('admin')")
        browser.until(SERVING)
        assert browser.js("return sessionStorage.length") == 1 and browser.js("return document.cookie") == ""
        browser.js("location.reload()")
        browser.until(SERVING)


def test_a_mesh_with_nothing_in_it_says_what_to_start(browser: Browser) -> None:
    with NatsServer.start() as server, gateway(server.url) as edge:
        browser.open(edge.url)
        state = browser.until("document.documentElement.dataset.standing === 'down' && document.querySelector('#state').innerText")
        assert "mesh up" in state
        assert browser.js("return document.querySelector('.picture-panel').hidden")
        assert browser.js("return document.querySelector('#shards-empty').innerText").startswith("No shard")


def test_the_page_reports_a_lost_nats_server_and_finds_it_again(browser: Browser) -> None:
    with ExitStack() as later:
        with NatsServer.start() as server:
            port = int(server.url.rpartition(":")[2])
            edge = later.enter_context(gateway(server.url))
            browser.open(edge.url)
            browser.until("document.querySelector('#state').innerText.includes('Nothing is here yet')")
        browser.until("document.querySelector('#state').innerText.includes('NATS server does not answer')")
        later.enter_context(NatsServer.start(port=port))
        browser.until("document.querySelector('#state').innerText.includes('Nothing is here yet')")


@pytest.mark.parametrize("width", [320, 390, 700])
def test_the_choice_of_a_model_fits_beside_the_views(mesh: LocalMesh, browser: Browser, width: int) -> None:
    """As in a mesh of two models, one of a long name; it is measured before the page is drawn again."""
    browser.emulate(width=width, phone=width < 500)
    page(browser, mesh)
    sizes = browser.js("""
        const choice = document.querySelector('#model-choice'), select = document.querySelector('#model');
        choice.hidden = false;
        for (const name of ['SmolLM2-135M-Instruct', 'Qwen3-Embedding-0.6B-with-a-long-name']) select.append(new Option(name, name));
        const box = (name) => document.querySelector(name).getBoundingClientRect();
        return [document.documentElement.scrollWidth, box('#model').right, box('#model').width, box('#theme-button').right, innerWidth];
    """)
    page_width, right, choice, theme, inner = sizes
    assert page_width <= inner and right <= inner and theme <= inner and choice >= 100, sizes
