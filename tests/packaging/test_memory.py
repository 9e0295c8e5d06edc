"""The memory that the packaging files give the proxy: what docs/operations.md says that it needs.

And what that page says of memory and CPU is what was measured, as it was published last.
"""

import json
import re

import pytest

from tests.packaging.manifests import (
    ROOT,
    SIDECAR,
    compose,
    parsed,
    pod_of,
    sidecar,
    unit_settings,
)

LEAST_MIB = 128
LIMIT_MIB = 512


OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
# Of the memory at rest, of a session's, and of the CPU of each kind of work.
PUBLISHED_MAY_DIFFER = 0.1


def test_the_least_memory_is_documented() -> None:
    assert f"at least {LEAST_MIB} MiB, with a limit of {LIMIT_MIB} MiB" in OPERATIONS


def test_the_table_of_sizes_is_the_sum_of_its_parts() -> None:
    (thousand,) = re.findall(r"on a few connections \| (\d+)m", OPERATIONS)
    at_rest, session = re.findall(r"takes (\d+) MB at rest and (\d+) kB more", OPERATIONS)[0]
    row = r"^\| ([\d,]+) \| (\d+) MB \| (\d+) MiB \| (\d+) MiB \| (\d+)m \|"
    rows = re.findall(row, OPERATIONS, re.MULTILINE)
    assert rows
    for sessions, taken, request, limit, cpu in rows:
        expected = int(at_rest) + int(sessions.replace(",", "")) * int(session) / 1000
        assert int(taken) == pytest.approx(expected, abs=1)
        assert expected * 1e6 <= int(request) * 1024**2 < int(limit) * 1024**2
        transactions = 2 * int(sessions.replace(",", ""))
        assert int(cpu) == max(100, transactions * int(thousand) / 1000)


def published(case: str, name: str) -> float:
    record = json.loads((ROOT / "docs" / "performance.json").read_text())
    (found,) = (
        one["medians"]["proxy"]
        for one in record["quantities"]
        if (one["case"], one["name"]) == (case, name)
    )
    return float(found)


@pytest.mark.parametrize(
    ("words", "case", "name", "times"),
    [
        (r"takes (\d+) MB at rest", "resident memory", "at rest", 1),
        (r"and (\d+) kB more for each", "resident memory", "per session of 1,000", 1),
        (r"on a few connections \| (\d+)m", "pgbench simple, 1 client", "CPU", 1),
        (r"many busy connections \| (\d+)m", "pgbench simple, 8 clients", "CPU", 1),
        (r"10 new connections a second \| (\d+)m", "connect, PostgreSQL 1 ms away", "CPU", 10),
    ],
)
def test_what_is_said_of_sizes_was_measured(words: str, case: str, name: str, times: float) -> None:
    (said,) = re.findall(words, OPERATIONS)
    measured = published(case, name) * times
    assert measured <= int(said) * (1 + PUBLISHED_MAY_DIFFER)
    assert int(said) <= measured * 1.5


def test_the_sidecar_requests_it() -> None:
    given = sidecar(pod_of(parsed((SIDECAR / "sidecar.yaml").read_text())))["resources"]
    assert given["requests"]["memory"] == f"{LEAST_MIB}Mi"
    assert given["limits"]["memory"] == f"{LIMIT_MIB}Mi"


def test_the_compose_file_reserves_it() -> None:
    service = compose()["services"]["lakebase-auth-proxy"]
    given = service["mem_reservation"], service["mem_limit"]
    assert given == (f"{LEAST_MIB}m", f"{LIMIT_MIB}m")


def test_the_unit_keeps_it() -> None:
    unit = unit_settings()
    assert (unit["MemoryMin"], unit["MemoryMax"]) == ([f"{LEAST_MIB}M"], [f"{LIMIT_MIB}M"])
