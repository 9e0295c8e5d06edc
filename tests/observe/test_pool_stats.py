"""The rows of pools: added up over targets, reloads and processes, and what is shown of them."""

import json
from dataclasses import fields

from prometheus_client.parser import text_string_to_metric_families

from proxy.observe.aggregation import Reading, total
from proxy.observe.metrics import Metrics
from proxy.observe.pool_stats import PoolPresent, PoolRow, PoolStats
from proxy.pool.pool_counts import PoolCounts, RetireReason, SpareResult, TakeSource
from tests.support.admin_address import ScriptedAdminState


class CountedPool:
    """A pool that has no sessions but what a test says."""

    def __init__(self, metrics: Metrics, target: str = "eu", at: float = 5.0) -> None:
        self.target = target
        self.counts = PoolCounts(lambda: at)
        self.present = PoolPresent(mode="session")
        self.unregister = metrics.pools.register(target, self.row)

    def row(self) -> PoolRow:
        return self.counts.row(self.target, self.present)


def a_process(*targets: str) -> Metrics:
    metrics = Metrics(version="1", session_end_outcomes={}, startup_failure_reasons=[])
    metrics.configure(targets or ["eu"])
    return metrics


def reading(metrics: Metrics) -> Reading:
    """Return a reading as another process receives it."""
    own = Reading(samples=metrics.samples(), pools=metrics.pools.rows())
    return Reading.from_dict(json.loads(json.dumps(own.as_dict())))


def shown(exposition: bytes) -> dict[str, float]:
    """Return the values of pools by name and labels, as they are written."""
    return {
        f"{one.name.removeprefix('lakebase_proxy_')}"
        f"{''.join('/' + one.labels[name] for name in sorted(one.labels))}": one.value
        for family in text_string_to_metric_families(exposition.decode())
        for one in family.samples
        if one.name.startswith("lakebase_proxy_pool_")
    }


def test_p50_without_a_pool_there_are_no_series_of_targets() -> None:
    values = shown(a_process().exposition())
    assert {name.partition("_seconds")[0] for name in values} == {"pool_wait", "pool_reset"}
    assert not any(values.values())


def test_p50_every_series_is_there_before_its_first_event() -> None:
    metrics = a_process()
    CountedPool(metrics)
    values = shown(metrics.exposition())
    assert not any(values.values())
    for series in (
        *(f"pool_sessions/{state}/eu" for state in ("in_use", "idle", "resetting", "dialling")),
        *(f"pool_takes_total/{source}/eu" for source in TakeSource),
        *(f"pool_retired_total/{reason}/eu" for reason in RetireReason),
        *(f"pool_spares_total/{result}/eu" for result in SpareResult),
        *(
            "pool_waiting/eu",
            "pool_login_triggers/eu",
            "pool_wait_seconds_count",
            "pool_reset_seconds_bucket/+Inf",
        ),
    ):
        assert series in values


def test_p50_a_scrape_shows_the_present_and_the_counts() -> None:
    metrics = a_process()
    pool = CountedPool(metrics)
    pool.present = PoolPresent(
        mode="session", in_use=3, idle=2, resetting=1, waiting=4, login_triggers=1
    )
    pool.counts.taken(TakeSource.WAITED)
    pool.counts.retired(RetireReason.SURPLUS)
    pool.counts.spare_ended(SpareResult.OPENED)
    pool.counts.waited(0.02)
    pool.counts.reset_took(0.0003)
    values = shown(metrics.exposition())
    assert {name: value for name, value in values.items() if value and "bucket" not in name} == {
        "pool_sessions/in_use/eu": 3,
        "pool_sessions/idle/eu": 2,
        "pool_sessions/resetting/eu": 1,
        "pool_waiting/eu": 4,
        "pool_login_triggers/eu": 1,
        "pool_takes_total/waited/eu": 1,
        "pool_retired_total/surplus/eu": 1,
        "pool_spares_total/opened/eu": 1,
        "pool_wait_seconds_count": 1,
        "pool_wait_seconds_sum": 0.02,
        "pool_reset_seconds_count": 1,
        "pool_reset_seconds_sum": 0.0003,
    }
    assert (values["pool_wait_seconds_bucket/0.01"], values["pool_wait_seconds_bucket/0.025"]) == (
        0,
        1,
    )


def test_p50_all_of_it_adds_up_over_workers() -> None:
    processes = [a_process() for _ in range(3)]
    pools = [CountedPool(metrics, at=10.0 - at) for at, metrics in enumerate(processes)]
    for at, pool in enumerate(pools, 1):
        pool.present = PoolPresent(mode="session", keys=1, idle=at, size_max=4, oldest_seconds=at)
        pool.counts.taken(TakeSource.REUSED)
        pool.counts.waited(at / 10)
        pool.counts.retired(RetireReason.IDLE)
    pools[2].counts.retired(RetireReason.BUSY)  # at 8.0, before the first one's
    supervisor, *workers = processes
    others = total(list(map(reading, workers)))
    values = shown(supervisor.exposition(others.samples))
    assert values["pool_sessions/idle/eu"] == 1 + 2 + 3
    assert values["pool_takes_total/reused/eu"] == 3
    assert values["pool_wait_seconds_count"] == values["pool_wait_seconds_bucket/+Inf"] == 3
    assert values.keys() == shown(supervisor.exposition()).keys()
    (row,) = total([others, reading(supervisor)]).pools
    assert (row.present.keys, row.present.idle, row.present.size_max) == (3, 6, 12)
    assert row.present.oldest_seconds == 3
    assert (row.retired["idle"], row.retired["busy"], row.last_retired) == (3, 1, "idle")
    assert round(row.waits.seconds, 6) == 0.6


def test_p50_a_supervisor_without_pools_shows_those_of_its_workers() -> None:
    worker = a_process()
    CountedPool(worker).counts.taken(TakeSource.DIALLED)
    values = shown(a_process().exposition(reading(worker).samples))
    assert values["pool_takes_total/dialled/eu"] == 1


def test_p50_the_counts_of_a_worker_that_died_stay_and_its_sessions_do_not() -> None:
    worker = a_process()
    pool = CountedPool(worker)
    pool.present = PoolPresent(mode="session", idle=2, keys=2)
    pool.counts.taken(TakeSource.REUSED)
    left = reading(worker).after_exit()
    values = shown(a_process().exposition(left.samples))
    assert values["pool_takes_total/reused/eu"] == 1
    assert values.get("pool_sessions/idle/eu", 0) == 0
    assert left.pools[0].present == PoolPresent()


def test_p50_a_reload_loses_no_count_and_drops_those_of_removed_targets() -> None:
    metrics = a_process("eu", "us")
    one, two, us = CountedPool(metrics), CountedPool(metrics), CountedPool(metrics, "us")
    for pool in (one, two, us):
        pool.present = PoolPresent(mode="session", in_use=1)
        pool.counts.taken(TakeSource.DIALLED)
    one.unregister()
    one.unregister()  # once is enough
    values = shown(metrics.exposition())
    assert (values["pool_takes_total/dialled/eu"], values["pool_sessions/in_use/eu"]) == (2, 1)
    metrics.configure(["us"])
    assert shown(metrics.exposition())["pool_takes_total/dialled/eu"] == 2, "one is in use yet"
    two.unregister()
    us.unregister()
    assert [row.target for row in metrics.pools.rows()] == ["us"]


def test_old_names_do_not_accumulate() -> None:
    stats = PoolStats()
    for number in range(100):
        name = f"t{number}"
        stats.configure([name])
        counts = PoolCounts()
        row = counts.row(name, PoolPresent(mode="session"))
        stats.register(name, lambda row=row: row)()  # type: ignore[misc]
    assert [row.target for row in stats.rows()] == ["t99"]


def test_p50_status_shows_no_user_database_or_setting() -> None:
    state = ScriptedAdminState()
    pool = CountedPool(state.metrics, "upstream", at=1_790_000_000.0)
    pool.present = PoolPresent(mode="session", keys=2, in_use=1, idle=3, oldest_seconds=12.5)
    pool.counts.taken(TakeSource.REUSED)
    pool.counts.retired(RetireReason.BUSY)
    assert json.loads(json.dumps(state.status().as_dict()))["pools"] == [
        {
            "target": "upstream",
            "mode": "session",
            "keys": 2,
            "in_use": 1,
            "idle": 3,
            "resetting": 0,
            "dialling": 0,
            "waiting": 0,
            "size_max": 0,
            "oldest_seconds": 12.5,
            "login_triggers": 0,
            "reused": 1,
            "dialled": 0,
            "waited": 0,
            "last_retired": "busy",
            "last_retired_at": "2026-09-21T14:13:20+00:00",
        }
    ]
    assert {field.name for field in fields(PoolPresent)} == {
        *("mode", "keys", "in_use", "idle", "resetting", "dialling", "waiting", "size_max"),
        *("oldest_seconds", "login_triggers"),
    }


def test_p50_status_does_not_show_pools_that_a_reload_has_turned_off() -> None:
    state = ScriptedAdminState()
    state.metrics.configure(["upstream"])
    pool = CountedPool(state.metrics, "upstream")
    pool.counts.taken(TakeSource.REUSED)
    pool.unregister()
    assert state.status().pools == []
    assert shown(state.exposition())["pool_takes_total/reused/upstream"] == 1
