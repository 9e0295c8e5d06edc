"""What a shard answers to a session of a shard key, whatever its client brings."""

from typing import Final

import pytest

from proxy.catalogue.admission import Admission, AdmissionRequest, Verdict, admit
from proxy.errors import ErrorKind
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from proxy.wire.secret import Secret
from tests.support.catalogue import Stores
from tests.support.dialing import asked
from tests.support.direct_sidecar import Sidecar, direct_sidecar
from tests.support.operator import Operator, Placed
from tests.support.running import eventually


async def test_s15_session_is_opened_in_the_shard_that_has_the_key_and_registered(
    sidecar: Sidecar, placed: Placed
) -> None:
    session = await sidecar.open()
    pid = int(await asked(session, "select pg_backend_pid()"))
    (row,) = await sidecar.operator.registered("one")
    assert (row["pid"], row["mapping_id"], row["epoch"]) == (pid, placed.mapping_id, 1)
    assert (row["key"], row["proxy"]) == (sidecar.operator.keys.parse_key("5"), "proxy-1/17")
    assert len(row["ticket"]) == 32
    by = session.admitted_by
    assert by is not None
    assert (by.target, by.mapping_id, by.epoch) == ("tenants/one", placed.mapping_id, 1)
    assert sidecar.counts.verdicts == [Verdict.OK]
    assert (await sidecar.open("1000")).admitted_by.target == "tenants/two"  # type: ignore[union-attr]


async def test_s18_key_that_moved_costs_one_look_and_one_dial(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.open()
    await sidecar.operator.move(placed, "two")
    queries = sidecar.source.queries
    session = await sidecar.open()
    assert session.admitted_by is not None
    assert session.admitted_by.target == "tenants/two"
    assert sidecar.source.queries == queries + 1
    assert sidecar.counts.stale == 1
    assert sidecar.counts.verdicts[-2:] == [Verdict.MAPPING_MISSING, Verdict.OK]


async def test_s18_r3_without_validation_the_known_shard_gets_it(
    operator: Operator, placed: Placed
) -> None:
    catalogue = {"validate": False, "allow_unvalidated": True}
    async with direct_sidecar(operator, catalogue=catalogue) as sidecar:
        await sidecar.open()
        await operator.move(placed, "two")
        session = await sidecar.open()
        assert session.admitted_by is not None
        assert session.admitted_by.target == "tenants/one"
        assert sidecar.counts.verdicts == []


async def test_s19_key_that_was_deleted_is_not_found(sidecar: Sidecar, placed: Placed) -> None:
    await sidecar.open()
    await sidecar.operator.delete(placed)
    assert (await sidecar.refusal()).kind is ErrorKind.MAPPING_NOT_FOUND


async def test_mapping_that_changes_with_every_look_is_stale(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.open()
    # The shard is ahead of the catalogue, whatever is asked.
    async with sidecar.operator.stores.connect("one") as local:
        await local.execute("update shardmap_local.mapping set epoch = epoch + 5")
    error = await sidecar.refusal()
    assert error.kind is ErrorKind.MAPPING_STALE
    assert sidecar.counts.verdicts[-2:] == [Verdict.STALE, Verdict.STALE]


async def test_s40_copy_of_a_shard_is_another_shard(sidecar: Sidecar, placed: Placed) -> None:
    async with sidecar.operator.stores.connect("one") as local:
        await local.execute("update shardmap_local.identity set location = 'other:5432/app'")
    queries = sidecar.source.queries
    error = await sidecar.refusal()
    assert error.kind is ErrorKind.WRONG_SHARD
    assert error.response().sqlstate == "55000"
    assert sidecar.counts.verdicts == [Verdict.WRONG_SHARD]
    assert sidecar.source.queries == queries + 1, "the first look, and no other"


async def test_s41_restored_shard_is_behind_and_is_not_asked_again(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.operator.catalogue("update shardmap.mapping set epoch = 9")
    assert (await sidecar.refusal()).kind is ErrorKind.SHARD_BEHIND
    assert sidecar.counts.verdicts == [Verdict.SHARD_BEHIND]


async def test_s25_database_without_the_schema_is_no_valid_shard(
    sidecar: Sidecar, placed: Placed
) -> None:
    async with sidecar.operator.stores.connect("one") as local:
        await local.execute("drop schema shardmap_local cascade")
    assert (await sidecar.refusal()).kind is ErrorKind.SHARD_NOT_VALID


async def test_session_role_without_the_right_is_denied(stores: Stores) -> None:
    operator = Operator(stores, MapSpec(Kind.RANGE, KeyType.INT4))
    await operator.install(grants=False)
    await operator.add("0", "10", "one")
    async with direct_sidecar(operator) as sidecar:
        error = await sidecar.refusal()
        assert error.kind is ErrorKind.VALIDATE_DENIED


async def test_s52_owner_that_cannot_see_sessions_registers_none(
    sidecar: Sidecar, placed: Placed
) -> None:
    stores = sidecar.operator.stores
    stores.execute("one", f'revoke pg_read_all_stats from "{stores.roles.admin}"')
    assert (await sidecar.refusal()).kind is ErrorKind.UNREGISTERED


async def test_store_of_another_major_version_is_refused(sidecar: Sidecar, placed: Placed) -> None:
    async with sidecar.operator.stores.connect("one") as local:
        await local.execute("update shardmap_local.identity set store_major = 2")
    assert (await sidecar.refusal()).kind is ErrorKind.STORE_VERSION


async def test_s76_backend_that_serves_several_clients_is_registered_for_the_last(
    sidecar: Sidecar, placed: Placed
) -> None:
    other = await sidecar.operator.add("20", "30", "one")
    session = await sidecar.open()
    pid = int(await asked(session, "select pg_backend_pid()"))

    async def take(key: str, secret: Secret | None) -> Admission:
        routing_key = sidecar.operator.keys.parse_key(key)
        located = await sidecar.source.ask(routing_key)
        return await admit(session.stream, AdmissionRequest(located, routing_key, "p", secret))

    # What a client without the secret asks changes nothing.
    assert (await take("25", None)).verdict is Verdict.UNREGISTERED
    (row,) = await sidecar.operator.registered("one")
    assert (row["pid"], row["mapping_id"]) == (pid, placed.mapping_id)
    # A new backend: three takes of two mappings.
    async with sidecar.operator.stores.connect("one") as local:
        await local.execute("delete from shardmap_local.session")
    first = await take("5", None)
    second = await take("25", first.secret)
    third = await take("5", second.secret)
    verdicts = [one.verdict for one in (first, second, third)]
    assert verdicts == [Verdict.OK] * 3
    (row,) = await sidecar.operator.registered("one")
    assert (row["pid"], row["mapping_id"]) == (pid, placed.mapping_id)
    assert (await take("25", second.secret)).verdict is Verdict.UNREGISTERED
    await sidecar.operator.end_sessions(other)
    assert len(await sidecar.operator.registered("one")) == 1
    await sidecar.operator.end_sessions(placed)
    await eventually(session.stream.gone.done, "the fence has ended it")


# -- hostile clients -----------------------------------------------------------------------------


HOSTILE: Final = {
    "read-only": "-c default_transaction_read_only=on",
    "serializable": "-c default_transaction_isolation=serializable",
    "strings": "-c standard_conforming_strings=off -c escape_string_warning=off",
    "search path": "-c search_path=evil,pg_temp",
    "encoding": "-c client_encoding=SJIS",
    "deferrable": "-c default_transaction_deferrable=on -c default_transaction_read_only=on",
    "floats and dates": "-c extra_float_digits=-15 -c DateStyle=German -c bytea_output=escape",
    "no scans": "-c enable_seqscan=off -c enable_indexscan=off -c jit=on -c jit_above_cost=0",
    "notices": "-c client_min_messages=debug5",
}


@pytest.mark.parametrize("options", HOSTILE.values(), ids=HOSTILE)
async def test_s51_defaults_of_the_client_do_not_disturb_the_admission(
    sidecar: Sidecar, placed: Placed, options: str
) -> None:
    session = await sidecar.open(options=options.encode())
    assert len(await sidecar.operator.registered("one")) == 1
    assert await asked(session, "select 1") == b"1"


async def test_s65_session_with_another_role_needs_the_right_itself(
    sidecar: Sidecar, placed: Placed
) -> None:
    stores = sidecar.operator.stores
    other = f"other-{stores.database}"
    stores.execute("one", f'create role "{other}"; grant "{other}" to "{stores.roles.session}"')
    try:
        options = f"-c role={other}".encode()
        assert (await sidecar.refusal(options=options)).kind is ErrorKind.VALIDATE_DENIED
        stores.execute(
            "one",
            f'grant usage on schema shardmap_local to "{other}";'
            f'grant execute on function shardmap_local.admit to "{other}"',
        )
        session = await sidecar.open(options=options)
        assert await asked(session, "select current_user") == other.encode()
        session.stream.transport.abort()
    finally:
        stores.execute("one", f'drop owned by "{other}"; drop role "{other}"')


async def test_statement_timeout_of_the_client_is_a_lost_upstream(
    sidecar: Sidecar, placed: Placed
) -> None:
    async with sidecar.operator.stores.connect("one") as local, local.transaction():
        await local.execute("select * from shardmap_local.mapping for update")
        error = await sidecar.refusal(options=b"-c statement_timeout=20")
        assert error.kind is ErrorKind.UPSTREAM_LOST
