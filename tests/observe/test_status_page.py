"""The page at `/`: its policy, and in a real browser its content.

The second half needs Chromium (Debian: `chromium`) and says so when there is none.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from proxy.observe.admin import AdminAddress, serve_admin
from proxy.observe.pool_stats import PoolPresent
from proxy.observe.status import Token
from proxy.observe.status_page import PAGE, PAGE_HEADERS
from proxy.observe.target_stats import Carried
from proxy.pool.pool_counts import PoolCounts, RetireReason, TakeSource
from proxy.server.lifecycle import State
from proxy.upstream.phases import ConnectPhase
from tests.support.admin_address import LOOPBACK, ScriptedAdminState, ask
from tests.support.chromium import Browser, Page, chromium_path, started_browser

CHROMIUM = chromium_path()
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="NOT TESTED: the page in a browser; install Chromium for it"
)
STATE = "document.getElementById('state')?.textContent"

# WCAG's contrast of each element that has text of its own against what is behind it.
FAINT_TEXT = """
(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const node of document.querySelectorAll("main, main *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility()) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push(`${node.textContent}: ${ratio.toFixed(2)}`);
  }
  return faint;
})()
"""


# -- without a browser ---------------------------------------------------------------------------


async def test_it_is_served_with_a_policy_that_allows_nothing_from_elsewhere() -> None:
    async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
        answer = await ask(address.port, "/")
    assert (answer.status, answer.body) == (200, PAGE)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy == PAGE_HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.headers["x-frame-options"] == "DENY"


def test_it_names_no_other_address_and_inserts_text_only_as_text() -> None:
    text = PAGE.decode()
    addresses = set(re.findall(r"\bhttps?://[^\s\"'>]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "only the name of SVG, never loaded"
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
    ):
        assert sink not in text
    assert not re.findall(r"\son\w+=", text), "the policy forbids handlers in attributes"
    assert not re.findall(r"\sstyle=", text)


def test_it_is_small() -> None:
    assert len(PAGE) < 32 * 1024


# -- in a browser --------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as entered:
        yield entered


@pytest_asyncio.fixture
async def browser(stack: AsyncExitStack, tmp_path: Path) -> Browser:
    assert CHROMIUM is not None
    return await stack.enter_async_context(started_browser(CHROMIUM, tmp_path / "profile"))


def busy() -> ScriptedAdminState:
    """Return a proxy that has something to show in every part."""
    shown = ScriptedAdminState(
        hosts={"upstream": f"ep-{'long-' * 12}name.database.eu-west-1.cloud.example.com"},
        shown_tokens=[Token("workspace", 23.0, 3577.0, 60.0), Token("old", 4000.0, -400.0, 240.0)],
        shown_warnings=['upstream.sslmode is "require": who is in between can read the token.'],
        uptime_seconds=93_784.0,
        session_slots_used=3,
    )
    for phase in ConnectPhase:
        shown.metrics.connect_phase_took(phase, 0.02, "upstream")
    for _ in range(3):
        shown.metrics.session_refused("role_missing", "28000", "upstream")
    pool(shown)
    return shown


def pool(shown: ScriptedAdminState, target: str = "upstream") -> None:
    """Show a pool that is used."""
    counts = PoolCounts()
    counts.taken(TakeSource.REUSED)
    counts.retired(RetireReason.PARAMETER_CHANGED)
    present = PoolPresent(
        mode="session", keys=7, in_use=31, idle=32, waiting=33, size_max=64, oldest_seconds=9e4
    )
    shown.metrics.pools.register(target, lambda: counts.row(target, present))


async def opened(
    stack: AsyncExitStack, browser: Browser, shown: ScriptedAdminState
) -> tuple[Page, AdminAddress]:
    """Return the page once it shows the state."""
    serving = serve_admin(shown, host=LOOPBACK, port=0)
    address = await stack.enter_async_context(serving)
    page = await browser.open(f"http://{LOOPBACK}:{address.port}/")
    await page.until(STATE, lambda state: state == shown.state)
    return page, address


@in_a_browser
@pytest.mark.slow
async def test_everything_is_visible(stack: AsyncExitStack, browser: Browser) -> None:
    shown = busy()
    with shown.metrics.session("upstream", lambda: Carried(2_000, 3_000_000)):
        page, _ = await opened(stack, browser, shown)
    seen = await page.text("main")
    for text in (
        *("serving", "1 of 1000, 2 opening", "127.0.0.1:5432", "1 d 2 h", "1.2.3", "1 session"),
        *(shown.hosts["upstream"], "2.0 kB to the upstream", "3.0 MB to clients"),
        *("Last connect 100 ms:", "mint 20 ms", "login 20 ms"),
        *("expires in 59 min 37 s", "minted 23 s ago, used up to an age of 1 min 0 s"),
        *("expired 6 min 40 s ago"),
        *("he role does not exist", "role_missing", "28000", "3 times", "databricks_create_role"),
        *(shown.shown_warnings[0], "every 2 s"),
        *(
            "Pools",
            "upstream\tsession\t31\t32\t33\t0\t0\t64\t7\t1 d 1 h\t1\t0\tparameter_changed",
        ),
    ):
        assert text in seen, f"{text!r} is not in {seen!r}"
    assert await page.value("document.getElementById('gone').hidden")


@in_a_browser
@pytest.mark.slow
async def test_an_idle_proxy_is_shown_without_gaps(stack: AsyncExitStack, browser: Browser) -> None:
    page, _ = await opened(stack, browser, ScriptedAdminState(hosts={"upstream": ""}))
    seen = await page.text("main")
    for text in ("host not looked up yet", "No connect yet.", "None minted yet.", "Recent errors"):
        assert text in seen
    assert "undefined" not in seen
    assert "NaN" not in seen
    assert "Pools" not in seen, "a proxy without a pool has none"


@in_a_browser
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_is_readable_in_light_and_dark_mode_and_on_a_phone(
    stack: AsyncExitStack, browser: Browser, scheme: str
) -> None:
    page, _ = await opened(stack, browser, busy())
    await page.prefer(scheme)
    ground = await page.value("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 64) == (scheme == "dark")
    for width in (320, 480, 500, 520, 600, 700, 760, 900, 1200):
        await page.resize(width, 900)
        assert await page.value("window.innerWidth") == width
        assert await page.value("document.documentElement.scrollWidth") <= width
        assert await page.value(FAINT_TEXT) == []
        assert await page.value("document.getElementById('listen').offsetHeight") < 32, "one line"


@in_a_browser
@pytest.mark.slow
async def test_it_refreshes_itself_and_shows_when_the_proxy_is_gone(
    browser: Browser,
) -> None:
    shown = ScriptedAdminState()
    async with AsyncExitStack() as stack:
        page, address = await opened(stack, browser, shown)
        shown.state, shown.drain_seconds_left = State.DRAINING, 29.5
        await page.until(STATE, lambda state: state == "draining, 29 s left")
    await page.until(STATE, lambda state: state == "no answer")
    assert "does not answer. What you see is from" in await page.text("#gone")
    assert await page.value("document.body.classList.contains('stale')")
    assert await page.value(FAINT_TEXT) == []
    shown.state = State.SERVING
    async with serve_admin(shown, host=LOOPBACK, port=address.port):
        await page.until(STATE, lambda state: state == "serving")
        assert await page.value("document.getElementById('gone').hidden")
        assert not await page.value("document.body.classList.contains('stale')")


@in_a_browser
@pytest.mark.slow
async def test_a_hidden_page_asks_nothing(stack: AsyncExitStack, browser: Browser) -> None:
    page, _ = await opened(stack, browser, ScriptedAdminState())
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


@in_a_browser
@pytest.mark.slow
async def test_text_that_looks_like_markup_stays_text(
    stack: AsyncExitStack, browser: Browser
) -> None:
    # Names come from a configuration, messages could once come from an upstream.
    attack = "<img src=x onerror=\"document.title='attacked'\"><script>document.title='x'</script>"
    shown = ScriptedAdminState(
        hosts={"upstream": attack},
        shown_warnings=[attack],
        shown_tokens=[Token(attack, 1, 1, 60)],
    )
    shown.metrics.targets.configure(["upstream", attack])
    shown.hosts[attack] = attack
    shown.metrics.session_refused(attack, "28000", attack)
    pool(shown, attack)
    page, _ = await opened(stack, browser, shown)
    assert await page.value("document.querySelectorAll('main img, main script').length") == 0
    assert (await page.text("main")).count(attack) == 9
    assert await page.value("document.title") == "lakebase-auth-proxy"


@in_a_browser
@pytest.mark.slow
async def test_the_policy_allows_the_page_and_nothing_else(
    stack: AsyncExitStack, browser: Browser
) -> None:
    page, _ = await opened(stack, browser, ScriptedAdminState())
    # The one style sheet and the one script run (opened waits for the script's work).
    assert await page.value("getComputedStyle(document.querySelector('main')).maxWidth") == "960px"
    injected = "document.body.append(Object.assign(document.createElement('style'), "
    injected += "{textContent: 'main { max-width: 7px }'}))"
    await page.value(f"{{ {injected} }}")
    assert await page.value("getComputedStyle(document.querySelector('main')).maxWidth") == "960px"
    refused = "fetch('https://example.com/').then(() => 'fetched', () => 'refused')"
    assert await page.value(refused) == "refused"
    with pytest.raises(AssertionError, match="TrustedHTML"):
        await page.value("document.body.innerHTML = '<b>x</b>'")


@in_a_browser
@pytest.mark.slow
async def test_a_screen_reader_announces_changes_only(
    stack: AsyncExitStack, browser: Browser
) -> None:
    page, _ = await opened(stack, browser, ScriptedAdminState())
    live = "[...document.querySelectorAll('[aria-live]')].map((n) => [n.id, n.ariaLive])"
    assert await page.value(live) == [["state", "polite"], ["gone", "polite"]]
    await page.value(
        "{ window.told = 0; new MutationObserver(() => { window.told += 1 }).observe("
        "document.getElementById('state'), {childList: true, characterData: true, subtree: true}) }"
    )
    shown_at = await page.value("refreshedAt")
    await page.until("refreshedAt", lambda at: at > shown_at)
    assert await page.value("window.told") == 0
    assert await page.value("document.documentElement.lang") == "en"
    assert await page.value("document.querySelectorAll('h1').length") == 1


async def test_the_browser_is_gone_after_its_block(tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("NOT TESTED: Chromium is not installed")
    before = len(asyncio.all_tasks())
    async with started_browser(CHROMIUM, tmp_path / "profile") as browser:
        assert "product" in await browser.call("Browser.getVersion")
    assert len(asyncio.all_tasks()) == before
