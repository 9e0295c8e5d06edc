"""The page at `/`: its policy, and in a real browser its content.

The second half needs Chromium (Debian: `chromium`) and axe-core (npm, in `.tools`) and says so when
one is missing. SCREENSHOTS=DIRECTORY keeps one of each state, size and colour scheme.
"""

import asyncio
import base64
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from proxy.errors import ErrorKind
from proxy.observe.admin import AdminAddress, serve_admin
from proxy.observe.history import SAMPLES_MAX
from proxy.observe.status import Token
from proxy.observe.status_page import FILES, PAGE_HEADERS
from proxy.server.lifecycle import State
from tests.support.admin_address import LOOPBACK, ScriptedAdminState, ask
from tests.support.chromium import Browser, Page, chromium_path, started_browser
from tests.support.page_states import CLIENT_ID, STATES, TARGETS, busy, failing, idle, pool, session
from tests.support.tools import lack

pytestmark = pytest.mark.asyncio(loop_scope="module")

AXE: Final = Path(__file__).parents[2] / ".tools/node_modules/axe-core/axe.min.js"
HEALTH: Final = "document.getElementById('health').textContent"
# Until a refresh has ended that began after the expression was evaluated.
REFRESHED: Final = "refreshedAt"
OVERFLOW: Final = """
[...document.querySelectorAll('body *')].filter((node) => node.checkVisibility()
  && node.getBoundingClientRect().right > innerWidth && !node.closest('.unseen, thead, .bar'))
  .map((node) => node.outerHTML.slice(0, 200))
"""
VIOLATIONS: Final = """
axe.run(document).then(({violations}) => violations.map(
  ({id, nodes}) => [id, ...nodes.map(({html, failureSummary}) => [html, failureSummary])]))
"""


# -- without a browser ---------------------------------------------------------------------------


async def test_it_is_served_with_a_policy_that_allows_nothing_from_elsewhere() -> None:
    async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
        for path, (content, media_type) in FILES.items():
            answer = await ask(address.port, path)
            assert (answer.status, answer.body) == (200, content)
            assert answer.headers["content-type"] == media_type
            assert {name.lower() for name in PAGE_HEADERS} <= answer.headers.keys()
    policy = PAGE_HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy


async def test_it_names_no_other_address_and_inserts_text_only_as_text() -> None:
    text = "".join(content.decode() for path, (content, _) in FILES.items() if path != "/reasons")
    addresses = set(re.findall(r"\bhttps?://[^\s\"'>]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "only the name of SVG, never loaded"
    sinks = ("innerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "outerHTML")
    assert [sink for sink in sinks if sink in text] == []
    assert not re.findall(r"\son\w+=", text), "the policy forbids handlers in attributes"
    assert not re.findall(r"\sstyle=", text)


async def test_it_is_small() -> None:
    assert sum(len(FILES[path][0]) for path in ("/", "/page.css", "/page.js")) < 32 * 1024


async def test_there_is_a_row_for_every_reason() -> None:
    text = FILES["/reasons"][0].decode()
    for kind in ErrorKind:
        assert text.count(f'<tr id="{kind.value.reason}">') == 1
    assert "{" not in text


# -- in a browser --------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    path = chromium_path()
    if path is None:
        lack("the page in a browser", ["chromium is missing"])
    assert path is not None
    async with started_browser(path, tmp_path_factory.mktemp("browser") / "profile") as started:
        yield started


@asynccontextmanager
async def opened(
    browser: Browser, shown: ScriptedAdminState, *, path: str = ""
) -> AsyncIterator[tuple[Page, AdminAddress]]:
    """Yield the page once it shows the proxy; the proxy is gone after the block."""
    async with serve_admin(shown, host=LOOPBACK, port=0) as address:
        page = await browser.open(f"http://{LOOPBACK}:{address.port}/{path}")
        if not path:
            await page.until(f"document.readyState === 'complete' && {REFRESHED}")
        yield page, address


async def refresh(page: Page) -> None:
    """Wait until the page shows the proxy as it is now."""
    await page.value("refresh()")
    before = await page.value(REFRESHED)
    await page.until(REFRESHED, lambda at: at > before)


async def violations(page: Page) -> Any:
    """Return what axe has against the page."""
    if not AXE.exists():
        lack("the page by axe", ["axe-core is missing"])
    if await page.value("typeof axe") != "object":
        await page.value(AXE.read_text())
    return await page.value(VIOLATIONS)


async def screenshot(page: Page, name: str) -> None:
    """Keep a screenshot of the page where SCREENSHOTS names a directory."""
    if directory := os.environ.get("SCREENSHOTS"):
        taken = await page.call("Page.captureScreenshot", captureBeyondViewport=True)
        file = Path(directory) / f"{name}.png"
        await asyncio.to_thread(file.write_bytes, base64.b64decode(taken["data"]))


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
async def test_each_state_is_whole_at_every_size_and_accessible_in_light_and_dark(
    browser: Browser, state: str
) -> None:
    async with opened(browser, STATES[state]()) as (page, _):
        for scheme in ("light", "dark"):
            await page.prefer(scheme)
            ground = await page.value("getComputedStyle(document.body).backgroundColor")
            assert (int(re.findall(r"\d+", ground)[0]) < 64) == (scheme == "dark")
            for width, height in ((360, 780), (1280, 900), (1920, 1080)):
                await page.resize(width, height)
                assert await page.value("innerWidth") == width
                assert await page.value(OVERFLOW) == []
                await screenshot(page, f"{state}-{width}-{scheme}")
            assert await violations(page) == []
        seen = await page.text("body")
        assert "undefined" not in seen
        assert "NaN" not in seen


@pytest.mark.slow
async def test_a_busy_proxy_shows_everything(browser: Browser) -> None:
    async with opened(browser, busy()) as (page, _):
        seen = await page.text("body")
    for text in (
        *("Serving 80 sessions.", "80 of 1,000, 3 opening", "127.0.0.1:5432", "1 d 2 h", "1.2.3"),
        *("connects", "refusals", "p50", "p99", "23 s", "40 targets"),
        "shop/eu-07\tserving\t4\t170 ms",
        "127.0.0.1:40003\tpsql\tapp\tdatabricks_postgres\tshop/eu-03\twaiting for login, 2 s",
        "50 of 60; all: lakebase-auth-proxy status --sessions",
        *(CLIENT_ID, "4 of 4 serve", "/etc/lakebase/proxy.toml", "reloaded at "),
        "shop (catalogue, ready): 4,096 mappings of int keys in 39 shards, version 17, feed list",
        "minted 23 s ago, expires in 59 min 37 s, used up to an age of 1 min 0 s",
        *("expired 6 min 40 s ago", 'upstream.sslmode is "require"', "every 2 s"),
    ):
        assert text in seen, f"{text!r} is not in {seen!r}"


@pytest.mark.slow
async def test_it_says_first_what_is_wrong_since_when_and_what_to_do(browser: Browser) -> None:
    async with opened(browser, failing()) as (page, address):
        sentence = await page.value(HEALTH)
        assert sentence.startswith("Serving 80 sessions. 16 refusals in the last minute: database_")
        advice = await page.text("#advice")
        assert re.match(r"Since \d\d:\d\d:\d\d, for 4 min 10 s. What to do: database_mis", advice)
        assert "Lakebase's default database" in advice
        errors = await page.text("#errors")
        assert errors.startswith("database_missing\n8 times in the last minute\nshop/eu-07")
        assert "5 times in the last minute\nshop/eu-08, shop/eu-06, shop/eu-05" in errors
        assert (await page.text("#targets")).startswith("upstream\tfailing\t"), "failing ones first"
        link = await page.value("document.querySelector('#advice a').href")
        assert link == f"http://{LOOPBACK}:{address.port}/reasons#database_missing"
        parts = "[...document.querySelectorAll('h2')].map((n) => n.textContent)"
        order = ["Errors", "Last 15 minutes", "40 targets", "Sessions", "Facts"]
        assert await page.value(parts) == order


@pytest.mark.slow
async def test_the_table_of_reasons_is_accessible(browser: Browser) -> None:
    async with opened(browser, idle(), path="reasons#role_missing") as (page, _):
        await page.until("document.querySelector('tr:target')?.textContent.includes('role')")
        await page.resize(360, 780)
        assert await page.value(OVERFLOW) == []
        assert await violations(page) == []


@pytest.mark.slow
async def test_strips_draw_no_failed_connect_and_no_refusal_as_none(browser: Browser) -> None:
    shown = failing()
    async with opened(browser, shown) as (page, _):
        lines = await page.value(
            "[...document.querySelectorAll('path')].map((p) => p.getAttribute('d'))"
        )
        seen = await page.text("#strips")
        tooltips = await page.value("document.querySelectorAll('#strips svg > title').length")
    # An earlier one was shown as if it were of now.
    assert re.search(r"p50 \u2013\s+p99 \u2013", seen), seen
    assert tooltips == 5
    points = [len(re.findall("[ML]", line)) for line in lines]
    # In the last samples no connect succeeded: both percentiles have a gap there.
    sessions, connects, refusals, p50, p99, *_ = points
    assert (sessions, connects, refusals) == (SAMPLES_MAX,) * 3
    assert p50 == p99 == SAMPLES_MAX - 6


@pytest.mark.slow
async def test_forty_targets_are_on_one_screen_with_details_by_keyboard(browser: Browser) -> None:
    async with opened(browser, busy()) as (page, _):
        await page.resize(1280, 900)
        height = await page.value("document.getElementById('targets-table').offsetHeight")
        assert await page.value("document.querySelectorAll('#targets > tr').length") == TARGETS
        assert height < 900
        await page.value("document.querySelector('#targets button').focus()")
        for name, code in (("Enter", 13), ("Tab", 9), (" ", 32)):
            for kind in ("keyDown", "keyUp"):
                text = {"Enter": "\r", " ": " "}.get(name, "") if kind == "keyDown" else ""
                keys = {"key": name, "windowsVirtualKeyCode": code, "text": text}
                await page.call("Input.dispatchKeyEvent", type=kind, **keys)
        names = "[...document.querySelectorAll('[aria-expanded=true]')].map((n) => n.textContent)"
        assert await page.value(names) == ["upstream", "shop/eu-01"]
        await refresh(page)
        assert await page.value("document.activeElement.textContent") == "shop/eu-01", "it stays"
        seen = await page.text("#targets")
        for text in (
            *("Last connect 100 ms: mint 20 ms, dns 20 ms", "login 20 ms", "cloud.example.com"),
            *("4.0 kB to the upstream", "6.0 MB to clients", "2 sessions since the start"),
            "Pool (session): 31 in use, 32 idle, 33 waiting, 0 resetting, 0 dialling, bound 64",
            "reused 1, dialled 0; oldest 1 d 1 h; last closed for parameter_changed",
        ):
            assert text in seen, f"{text!r} is not in {seen!r}"
        assert await violations(page) == []


@pytest.mark.slow
async def test_an_idle_proxy_is_shown_without_gaps(browser: Browser) -> None:
    async with opened(browser, idle()) as (page, _):
        await page.value("document.querySelector('#targets button').click()")
        seen = await page.text("body")
    for text in (
        *("Serving 0 sessions.", "host not looked up yet", "No connect yet.", "No client is conn"),
        *("none minted yet", "not looked up yet", "environment and flags, no file"),
    ):
        assert text in seen, f"{text!r} is not in {seen!r}"
    assert "Errors" not in seen


@pytest.mark.slow
async def test_it_refreshes_itself_and_shows_when_the_proxy_is_gone(browser: Browser) -> None:
    shown = busy()
    async with opened(browser, shown) as (page, address):
        shown.state, shown.drain_seconds_left = State.DRAINING, 29.5
        await page.until(HEALTH, lambda text: text.startswith("Draining: 80 sessions left"))
    await page.until(HEALTH, lambda text: "does not answer. What you see is from" in text)
    assert await page.value("document.body.classList.contains('stale')")
    for width in (360, 1280, 1920):
        await page.resize(width, 900)
        await screenshot(page, f"gone-{width}-light")
    assert await violations(page) == []
    shown.state = State.SERVING
    async with serve_admin(shown, host=LOOPBACK, port=address.port):
        await page.until(HEALTH, lambda text: text.startswith("Serving"))
        await page.until("!document.body.classList.contains('stale')")


@pytest.mark.slow
async def test_a_hidden_page_asks_nothing(browser: Browser) -> None:
    async with opened(browser, idle()) as (page, _):
        asked = "performance.getEntriesByName(`${location.origin}/status`).length"
        hide = "Object.defineProperty(document, 'hidden', {{configurable: true, get: () => {}}});"
        changed = "document.dispatchEvent(new Event('visibilitychange'));"
        await page.value(hide.format("true") + changed)
        before = await page.value(asked)
        # Longer than the time between two refreshes, by the page's own clock.
        await page.value("new Promise((done) => setTimeout(done, 2500))")
        assert await page.value(asked) == before
        await page.value(hide.format("false") + changed)
        await page.until(asked, lambda count: count > before)


@pytest.mark.slow
async def test_text_that_looks_like_markup_stays_text(browser: Browser) -> None:
    # Names come from a configuration, messages could once come from an upstream.
    attack = "<img src=x onerror=\"document.title='attacked'\"><script>document.title='x'</script>"
    shown = ScriptedAdminState(
        hosts={"upstream": attack, attack: attack},
        shown_warnings=[attack],
        shown_tokens=[Token(attack, 1, 1, 60)],
    )
    row = session(1)
    row["application_name"] = row["user"] = row["database"] = attack
    shown.shown_sessions = [row]
    shown.shown_facts = replace(shown.shown_facts, roles=[attack])
    shown.metrics.targets.configure(["upstream", attack])
    shown.metrics.session_refused(attack, "28000", attack)
    pool(shown, attack)
    async with opened(browser, shown) as (page, _):
        await page.value("document.querySelectorAll('#targets button').forEach((n) => n.click())")
        assert await page.value("document.querySelectorAll('body img, main script').length") == 0
        # Warning, token, role, three of the session; the target, both hosts; the reason four times.
        assert (await page.text("body")).count(attack) >= 12
        assert await page.value("document.title") == "bad: lakebase-auth-proxy"


@pytest.mark.slow
async def test_the_policy_allows_the_page_and_nothing_else(browser: Browser) -> None:
    async with opened(browser, idle()) as (page, address):
        width = "getComputedStyle(document.body).maxWidth"
        assert await page.value(width) == "1760px"
        injected = "document.body.append(Object.assign(document.createElement('style'), "
        injected += "{textContent: 'body { max-width: 7px }'}))"
        await page.value(f"{{ {injected} }}")
        assert await page.value(width) == "1760px"
        refused = "fetch('https://example.com/').then(() => 'fetched', () => 'refused')"
        assert await page.value(refused) == "refused"
        with pytest.raises(AssertionError, match="TrustedHTML"):
            await page.value("document.body.innerHTML = '<b>x</b>'")
        names = await page.value("performance.getEntriesByType('resource').map((one) => one.name)")
        own = f"http://{LOOPBACK}:{address.port}/"
        asked = {name.removeprefix(own) for name in names if not name.startswith("https://example")}
        wanted = {"page.css", "page.js", "status", "history", "sessions?limit=50"}
        assert {name for name in asked if not name.startswith("data:")} == wanted


@pytest.mark.slow
async def test_a_screen_reader_announces_changes_only(browser: Browser) -> None:
    shown = busy()
    async with opened(browser, shown) as (page, _):
        live = "[...document.querySelectorAll('[aria-live]')].map((n) => [n.id, n.ariaLive])"
        assert await page.value(live) == [["told", "polite"]]
        await page.value(
            "{ window.told = 0; new MutationObserver(() => { window.told += 1 }).observe("
            "document.getElementById('told'), {childList: true, characterData: true}) }"
        )
        shown.metrics.session("upstream").__enter__()  # the sentence changes
        await refresh(page)
        assert await page.value(HEALTH) == "Serving 81 sessions."
        assert await page.value("window.told") == 0
        shown.metrics.session_refused("role_missing", "28000", "upstream")
        await page.until("window.told")
        assert await page.text("#told") == "Something is wrong: role_missing"
        assert await page.value("document.documentElement.lang") == "en"


async def test_the_browser_is_gone_after_its_block(tmp_path: Path) -> None:
    path = chromium_path()
    if path is None:
        pytest.skip("NOT TESTED: Chromium is not installed")
    before = len(asyncio.all_tasks())
    async with started_browser(path, tmp_path / "profile") as browser:
        assert "product" in await browser.call("Browser.getVersion")
    assert len(asyncio.all_tasks()) == before
