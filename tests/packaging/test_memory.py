"""The memory that the packaging files give the proxy: what docs/operations.md says that it needs."""

import re

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


def test_the_least_memory_is_documented() -> None:
    (row,) = re.findall(r"^\| memory \|.*", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert f"at least {LEAST_MIB} MiB" in row
    assert f"a limit of {LIMIT_MIB} MiB" in row


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
