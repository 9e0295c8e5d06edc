"""Proxies as the page shows them: idle, busy, failing, draining. Gone is one that has ended.

For: tests and screenshots of the page. Not for: what a real proxy reports (`tests/e2e`).
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Final

from proxy.observe.connect_times import index_of
from proxy.observe.facts import Configuration, Facts
from proxy.observe.history import SAMPLES_MAX, Totals
from proxy.observe.pool_stats import PoolPresent
from proxy.observe.recent_errors import RecentErrors
from proxy.observe.session_page import SessionRow
from proxy.observe.status import ShardMapStatus, Token, WorkspaceApi
from proxy.pool.pool_counts import PoolCounts, RetireReason, TakeSource
from proxy.server.lifecycle import State
from proxy.upstream.phases import ConnectPhase
from tests.support.admin_address import NOW, ScriptedAdminState

TARGETS: Final = 40
CLIENT_ID: Final = "0f3a9c52-7be1-4d0c-9a44-5d1f0c6a1b2e"


def idle() -> ScriptedAdminState:
    """Return a proxy that no client has used yet."""
    return ScriptedAdminState(hosts={"upstream": ""}, uptime_seconds=42.0)


def busy() -> ScriptedAdminState:
    """Return a proxy of 40 targets that is well, with something to show in every part."""
    shown = used()
    fill(shown)
    return shown


def used() -> ScriptedAdminState:
    """Return the same without a history."""
    names = ["upstream", *(f"shop/eu-{number:02}" for number in range(1, TARGETS))]
    shown = ScriptedAdminState(
        hosts={
            name: f"ep-{'long-' * 9}name-{at}.database.eu-west-1.cloud.example.com"
            for at, name in enumerate(names)
        },
        shown_tokens=[Token("workspace", 23.0, 3577.0, 60.0), Token("old", 4000.0, -400.0, 240.0)],
        shown_warnings=['upstream.sslmode is "require": who is in between can read the token.'],
        shown_facts=Facts(
            4, 4, [CLIENT_ID], Configuration("/etc/lakebase/proxy.toml", NOW - 3600, "reloaded")
        ),
        shown_map=ShardMapStatus(
            name="shop",
            source="catalogue",
            kind="hash",
            key_type="int",
            version=17,
            mappings=4096,
            shards=39,
            state="ready",
            feed="listening",
            age_seconds=2.0,
            validate=True,
            parked=0,
        ),
        shown_sessions=[session(number) for number in range(60)],
        uptime_seconds=93_784.0,
        session_slots_used=83,
    )
    shown.metrics.targets.configure(names)
    use_targets(shown, names)
    pool(shown)
    return shown


def failing() -> ScriptedAdminState:
    """Return a proxy that refuses clients, at several targets and for several reasons."""
    shown = used()
    clock = iter([NOW - 250.0, *(NOW - 9.0 + each for each in range(7)), *[NOW - 5.0] * 9])
    shown.metrics.recent_errors = RecentErrors(lambda: next(clock))
    for _ in range(8):
        shown.metrics.session_refused("database_missing", "3D000", "shop/eu-07")
    for number in (3, 4, 5, 6, 8):
        shown.metrics.session_refused("upstream_unreachable", "57P03", f"shop/eu-{number:02}")
    for _ in range(3):
        shown.metrics.session_refused("role_missing", "28000", "upstream")
    shown.metrics.record_error("client_wants_tls", message="set sslmode=disable in the application")
    fill(shown, refused=shown.metrics.targets.refused, stalled=7)
    return shown


def outage() -> ScriptedAdminState:
    """Return a proxy whose workspace issues no tokens."""
    shown = idle()
    shown.shown_apis = [WorkspaceApi("workspace", NOW - 312.0, 312.0, "api_unreachable")]
    return shown


def draining() -> ScriptedAdminState:
    """Return a busy proxy that ends."""
    shown = busy()
    shown.state, shown.drain_seconds_left = State.DRAINING, 29.5
    return shown


STATES: Final[Mapping[str, Callable[[], ScriptedAdminState]]] = {
    "idle": idle,
    "busy": busy,
    "failing": failing,
    "outage": outage,
    "draining": draining,
}


def use_targets(shown: ScriptedAdminState, names: list[str]) -> None:
    """Open sessions at targets, which stay open."""
    opened = ExitStack()
    for at, name in enumerate(names):
        for _ in range((at * 7) % 5):
            opened.enter_context(shown.metrics.session(name))
            totals = shown.metrics.byte_totals(name)
            totals.client_bytes[0] += 2_000 * at
            totals.upstream_bytes[0] += 3_000_000
        for phase in ConnectPhase:
            shown.metrics.connect_phase_took(phase, 0.02, name)
        shown.metrics.targets.connected(name, 0.1 + at / 100)
    opened.pop_all()


def pool(shown: ScriptedAdminState, target: str = "upstream") -> None:
    """Show a pool that is used."""
    counts = PoolCounts()
    counts.taken(TakeSource.REUSED)
    counts.retired(RetireReason.PARAMETER_CHANGED)
    present = PoolPresent(
        mode="session", keys=7, in_use=31, idle=32, waiting=33, size_max=64, oldest_seconds=9e4
    )
    shown.metrics.pools.register(target, lambda: counts.row(target, present))


def session(number: int) -> SessionRow:
    """Return an open connection."""
    states = ("idle", "busy", "in transaction", "waiting")
    return {
        "id": number + 1,
        "client": f"127.0.0.1:{40_000 + number}",
        "pid": None,
        "command": None,
        "application_name": ("psql", "checkout-api", "reports")[number % 3],
        "user": "app",
        "database": "databricks_postgres",
        "target": f"shop/eu-{number % TARGETS or 1:02}",
        "shard": "",
        "shard_key": None,
        "age_seconds": 30.0 * number,
        "state": states[number % 4],
        "waits_for": "login" if number % 4 == 3 else None,
        "state_seconds": 2.0,
        "client_bytes": 1234 * number,
        "upstream_bytes": 98_765 * number,
    }


def fill(shown: ScriptedAdminState, *, refused: int = 0, stalled: int = 0) -> None:
    """Add fifteen minutes of history that end with the present counts.

    `refused` clients were so lately; no session has started in the last `stalled` samples.
    """
    end = shown.totals()
    started, sent, connects = end.started, end.client_bytes, list(end.connects)
    samples = [(end, 23.0)]
    received = end.upstream_bytes
    for ago in range(1, SAMPLES_MAX + 1):  # back from the present
        wave = math.sin(ago / 9)
        if ago >= stalled:
            started -= round(40 + 25 * wave)
            connects[index_of(0.08 + 0.03 * wave)] -= 40
            connects[index_of(0.5 if ago % 17 == 5 else 0.15)] -= 1
        sent -= round(2e6 + 1e6 * wave)
        received -= round(7e6 + 2e6 * wave)
        sessions = round(80 + 20 * wave)
        totals = Totals(sessions, started, end.refused - refused, sent, received, tuple(connects))
        samples.append((totals, (23.0 - 10 * ago) % 60))
    for totals, age in reversed(samples):
        shown.history.add(totals, age)
