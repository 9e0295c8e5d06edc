"""`resolve` and `check` of a sidecar's configuration with a map in the catalogue, as processes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from tests.support.catalogue import MAP, Stores
from tests.support.operator import Operator
from tests.support.proxy_process import run_to_end

pytestmark = [pytest.mark.slow]


@pytest_asyncio.fixture
async def operator(stores: Stores) -> Operator:
    made = Operator(stores, MapSpec(Kind.RANGE, KeyType.INT4))
    await made.install()
    await made.add("0", "10", "one")
    await made.add("1000", None, "two")
    return made


async def ran(operator: Operator, folder: Path, *words: str, **sections: Any) -> tuple[int, Any]:
    stores = operator.stores
    file = stores.file(folder, stores.roles.session, **sections)
    command = (sys.executable, "-m", "proxy", *words, "--json", "--config", str(file))
    code, out, err = await run_to_end(*command)
    assert err == ""
    return code, json.loads(out)


async def test_resolve_asks_the_catalogue_and_no_shard(operator: Operator, tmp_path: Path) -> None:
    lakebase = operator.stores.lakebase
    for shard in ("one", "two"):
        lakebase[shard].endpoint.disabled = True
    code, facts = await ran(operator, tmp_path, "resolve", "5")
    assert (code, facts["ok"], facts["target"]) == (0, True, "tenants/one")
    assert (facts["low"], facts["high"], facts["canonical_key"]) == ("0", "10", "80000005")
    assert facts["host"] == operator.stores.host("one")
    code, facts = await ran(operator, tmp_path, "resolve", "500")
    assert (code, facts["sqlstate"], facts["reason"]) == (1, "3D000", "mapping_not_found")


async def test_resolve_says_why_the_catalogue_is_not_read(
    operator: Operator, tmp_path: Path
) -> None:
    await operator.catalogue("update shardmap.shard_map set name = 'others'")
    code, facts = await ran(operator, tmp_path, "resolve", "5")
    assert (code, facts["reason"]) == (1, "map_missing")
    operator.stores.lakebase[MAP].endpoint.disabled = True
    code, facts = await ran(operator, tmp_path, "resolve", "5")
    assert (code, facts["reason"]) == (1, "catalogue_unreachable")


async def test_check_reads_the_map_and_asks_each_shard_for_an_admission(
    operator: Operator, tmp_path: Path
) -> None:
    code, facts = await ran(operator, tmp_path, "check")
    assert code == 0, facts
    assert [step["target"] for step in facts["steps"] if step["name"] == "catalogue"] == ["main"]
    assert not [step for step in facts["steps"] if step["name"] == "admission"]
    code, facts = await ran(operator, tmp_path, "check", "--all-shards")
    assert code == 0, facts
    # Who reads the catalogue needs no grants on its schema public.
    assert not [step for step in facts["steps"] if step["target"] == "main" and step["note"]]
    admissions = {
        step["target"]: step["text"] for step in facts["steps"] if step["name"] == "admission"
    }
    assert admissions == {
        f"tenants/{name}": f"may be called, as shard {name} of tenants" for name in ("one", "two")
    }
    assert await operator.registered("one") == []


async def test_check_shows_a_shard_that_would_not_admit(operator: Operator, tmp_path: Path) -> None:
    stores = operator.stores
    stores.execute("one", f'revoke usage on schema shardmap_local from "{stores.roles.session}"')
    await operator.catalogue(
        "update shardmap.shard set host = 'elsewhere.example.com' where name = 'two'"
    )
    code, facts = await ran(operator, tmp_path, "check", "--all-shards")
    assert code == 1
    failed = {step["target"]: step["reason"] for step in facts["steps"] if not step["ok"]}
    assert failed == {"tenants/one": "validate_denied", "tenants/two": "shard_host_refused"}
