"""A copy of the map in a file, so that a proxy can start while the catalogue cannot be reached.

For: writing and reading the file. Not for: whether what it says still holds; the shards decide that
for each session. It has shard keys and no secret: mode 0600.

The invariants: a reader finds a whole file or none, since it is written beside and renamed. A file
of another catalogue or map, a damaged one, or one of another form is never used.

The form: a line of JSON, then chunks of rows, each with the sizes of its columns before them; at
the end a chunk of no rows and the CRC of all before it.
"""

import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO, Final
from uuid import UUID
from zlib import crc32

from proxy.catalogue.model import CatalogueMap, Shard, Status, is_shard_name
from proxy.catalogue.packed_rows import CHUNK_ROWS_MAX, RowChunk
from proxy.routing.keys import KEY_BYTES_MAX, KeyType, Normalise
from proxy.routing.shard_map import Kind, MapSpec

FORMAT: Final = 1
# Of the first line: some thousand shards.
_HEAD_BYTES_MAX: Final = 16 * 1024 * 1024
_COLUMNS: Final = [field.name for field in fields(RowChunk)]
_SIZES: Final = Struct(f">{len(_COLUMNS)}I")
_CRC: Final = Struct(">I")
# Of a bigint.
VERSION_MAX: Final = 2**63 - 1
_A_SHARD: Final = Shard(UUID(int=0), UUID(int=0), "a", "a", 1, "a")
_COLUMN_BYTES_MAX: Final = CHUNK_ROWS_MAX * (KEY_BYTES_MAX + 1)


@dataclass(frozen=True, slots=True)
class CataloguePlace:
    """Which catalogue a file is of."""

    host: str
    port: int
    database: str


@dataclass(frozen=True, slots=True)
class SavedMap:
    """What a file says before its rows."""

    place: CataloguePlace
    map: CatalogueMap
    shards: tuple[Shard, ...]


class SnapshotUnusable(Exception):
    """A file that is not used; the text says why."""


def write(path: Path, saved: SavedMap, chunks: Iterable[RowChunk]) -> None:
    """Replace the file. Raises OSError."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            crc = 0
            for part in _parts(saved, chunks):
                file.write(part)
                crc = crc32(part, crc)
            file.write(_CRC.pack(crc))
            file.flush()
            os.fsync(descriptor)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _parts(saved: SavedMap, chunks: Iterable[RowChunk]) -> Iterator[bytes]:
    yield json.dumps(_head_of(saved)).encode() + b"\n"
    for chunk in chunks:
        columns: Sequence[bytes] = [getattr(chunk, name) for name in _COLUMNS]
        yield _SIZES.pack(*map(len, columns)) + b"".join(columns)
    yield _SIZES.pack(*[0] * len(_COLUMNS))


@contextmanager
def opened(
    path: Path, place: CataloguePlace, name: str
) -> Iterator[tuple[SavedMap, Iterator[RowChunk]]]:
    """Yield what the file says, and its rows, which are read from the file as they are taken.

    Raises SnapshotUnusable, also while the rows are taken, and OSError.
    """
    with path.open("rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise SnapshotUnusable("it is not a regular file")
        line = file.readline(_HEAD_BYTES_MAX)
        saved = _saved_of(line)
        if (saved.place, saved.map.name) != (place, name):
            there = saved.place
            raise SnapshotUnusable(
                f"it is of the map {saved.map.name} in the catalogue"
                f" {there.host}:{there.port}/{there.database}"
            )
        yield saved, _chunks(file, crc32(line))


def _chunks(file: BinaryIO, crc: int) -> Iterator[RowChunk]:
    while True:  # bounded by the file
        sizes = _exactly(file, _SIZES.size)
        columns = {}
        crc = crc32(sizes, crc)
        for name, size in zip(_COLUMNS, _SIZES.unpack(sizes), strict=True):
            if size > _COLUMN_BYTES_MAX:
                raise SnapshotUnusable("it is damaged")
            columns[name] = _exactly(file, size)
            crc = crc32(columns[name], crc)
        if not any(columns.values()):
            break
        try:
            yield RowChunk.of(columns)
        except ValueError:
            raise SnapshotUnusable("it is damaged") from None
    if _exactly(file, _CRC.size) != _CRC.pack(crc):
        raise SnapshotUnusable("it is damaged")


def _exactly(file: BinaryIO, size: int) -> bytes:
    found = file.read(size)
    if len(found) != size:
        raise SnapshotUnusable("it ends too soon")
    return found


# -- the first line ------------------------------------------------------------------------------


def _head_of(saved: SavedMap) -> dict[str, object]:
    spec, found = saved.map.spec, saved.map
    return {
        "format": FORMAT,
        "catalogue": asdict(saved.place),
        "map": {
            "map_id": str(found.map_id),
            "name": found.name,
            "kind": spec.kind,
            "key_type": spec.key_type,
            "normalise": spec.normalise,
            "version": found.version,
        },
        "shards": [
            {
                **asdict(shard),
                "shard_id": str(shard.shard_id),
                "map_id": str(shard.map_id),
                "op_id": None if shard.op_id is None else str(shard.op_id),
            }
            for shard in saved.shards
        ],
    }


def _saved_of(line: bytes) -> SavedMap:
    """Return what the first line says. Raises SnapshotUnusable."""
    try:
        head = json.loads(line)
        if head["format"] != FORMAT:
            raise SnapshotUnusable("it is of another version of the proxy")
        found = head["map"]
        spec = MapSpec(
            Kind(found["kind"]), KeyType(found["key_type"]), Normalise(found["normalise"])
        )
        return SavedMap(
            CataloguePlace(**head["catalogue"]),
            CatalogueMap(UUID(found["map_id"]), found["name"], spec, _version_of(found["version"])),
            tuple(map(_shard_of, head["shards"])),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise SnapshotUnusable("it is no snapshot of a map") from None


def _version_of(found: object) -> int:
    if type(found) is not int or not 0 < found <= VERSION_MAX:
        raise ValueError("no version")
    return found


def _shard_of(row: dict[str, Any]) -> Shard:
    typed = {
        "shard_id": UUID(row["shard_id"]),
        "map_id": UUID(row["map_id"]),
        "status": Status(row["status"]),
        "op_id": None if row["op_id"] is None else UUID(row["op_id"]),
    }
    shard = Shard(**{**row, **typed})
    is_typed = all(
        type(getattr(shard, field.name)) is type(getattr(_A_SHARD, field.name))
        for field in fields(Shard)
        if field.name != "op_id"
    )
    if not is_typed or not is_shard_name(shard.name) or not shard.fault.isprintable():
        raise ValueError("no shard")
    return shard
