"""Mappings, shards and changes as messages between the supervisor and its workers.

For: values that JSON has, and back. Not for: asking (`remote_map`) or answering (`map_answers`).
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

from proxy.catalogue.map_state import Change
from proxy.catalogue.model import Located, Mapping, SessionsMode, Shard, Status
from proxy.routing.keys import KeyType, Normalise
from proxy.routing.shard_map import Kind, MapSpec

Message = dict[str, Any]


def located_as_dict(located: Located) -> Message:
    """Return a mapping and its shard as a message."""
    mapping, shard = located.mapping, located.shard
    drain_until = mapping.drain_until
    return {
        "mapping": [
            *(mapping.mapping_id.hex, mapping.map_id.hex, mapping.shard_id.hex),
            *(mapping.lo.hex(), None if mapping.hi is None else mapping.hi.hex()),
            *(mapping.status, mapping.sessions),
            None if drain_until is None else drain_until.isoformat(),
            *(mapping.epoch, None if mapping.op_id is None else mapping.op_id.hex),
        ],
        "shard": [
            *(shard.name, shard.host, shard.port, shard.database, shard.endpoint, shard.instance),
            *(shard.workspace, shard.status, shard.version),
            None if shard.op_id is None else shard.op_id.hex,
        ],
    }


def located_from_dict(content: Message) -> Located:
    """Return what `located_as_dict` was given."""
    mapping_id, map_id, shard_id, lo, hi, status, sessions, drain, epoch, op_id = content["mapping"]
    mapping = Mapping(
        *(UUID(mapping_id), UUID(map_id), UUID(shard_id)),
        bytes.fromhex(lo),
        None if hi is None else bytes.fromhex(hi),
        Status(status),
        SessionsMode(sessions),
        None if drain is None else datetime.fromisoformat(drain),
        epoch,
        op_id=None if op_id is None else UUID(op_id),
    )
    name, host, port, database, endpoint, instance, workspace, *state = content["shard"]
    status, version, op_id = state
    shard = Shard(
        *(UUID(shard_id), UUID(map_id), name, host, port, database),
        *(endpoint, instance, workspace),
        status=Status(status),
        version=version,
        op_id=None if op_id is None else UUID(op_id),
    )
    return Located(mapping, shard)


def spec_as_list(spec: MapSpec) -> list[str]:
    """Return the kind of a map and the type of its keys as a message."""
    return [spec.kind, spec.key_type, spec.normalise]


def spec_from_list(content: Iterable[str]) -> MapSpec:
    """Return what `spec_as_list` was given."""
    kind, key_type, normalise = content
    return MapSpec(Kind(kind), KeyType(key_type), Normalise(normalise))


def change_as_dict(change: Change) -> Message:
    """Return a change as a message."""
    ids = change.mapping_ids
    return {
        "mapping_ids": None if ids is None else [one.hex for one in ids],
        "shard_ids": [one.hex for one in change.shard_ids],
    }


def change_from_dict(content: Message) -> Change:
    """Return what `change_as_dict` was given."""
    ids = content["mapping_ids"]
    return Change(
        None if ids is None else frozenset(map(UUID, ids)),
        frozenset(map(UUID, content["shard_ids"])),
    )
