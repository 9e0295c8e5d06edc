"""The snapshot file: it comes back as it was written, or is not used."""

import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.catalogue.model import CatalogueMap, Mapping, Status
from proxy.catalogue.packed_rows import RowChunk
from proxy.catalogue.snapshot_file import (
    CataloguePlace,
    SavedMap,
    SnapshotUnusable,
    opened,
    write,
)
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from tests.support.mappings import (
    MAP_ID,
    SHARDS,
    SPECS,
    chunk_of,
    mapping,
    mappings,
    sorted_apart,
)

PLACE = CataloguePlace("map.example.com", 5432, "shardmap")
SPEC = MapSpec(Kind.RANGE, KeyType.INT4)
SAVED = SavedMap(
    PLACE,
    CatalogueMap(MAP_ID, "tenants", SPEC, 7),
    (
        *SHARDS.values(),
        replace(SHARDS[UUID(int=1)], status=Status.OFFLINE, op_id=UUID(int=9), workspace="eu"),
    ),
)
ROWS = [mapping(b"", b"\x80\0\0\0"), mapping(b"\x80\0\0\0", None, 2, status=Status.OFFLINE)]


TEXTS = ("name", "host", "database", "endpoint", "instance", "workspace", "fault")


def read(
    file: Path, place: CataloguePlace = PLACE, name: str = "tenants"
) -> tuple[SavedMap, list[RowChunk]]:
    with opened(file, place, name) as (saved, chunks):
        return saved, list(chunks)


def written(folder: Path, rows: Sequence[Mapping] = ROWS) -> Path:
    file = folder / "map.snapshot"
    write(file, SAVED, [chunk_of(rows)] if rows else [])
    return file


@given(st.data())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, data: object) -> None:
    assert isinstance(data, st.DataObject)
    spec = data.draw(SPECS)
    rows = data.draw(st.lists(mappings(spec), max_size=6).map(sorted_apart))
    file = tmp_path_factory.mktemp("snapshots") / "map"
    saved = replace(SAVED, map=replace(SAVED.map, spec=spec))
    chunks = [chunk_of(rows[at : at + 2]) for at in range(0, len(rows), 2)]
    write(file, saved, chunks)
    assert read(file) == (saved, chunks)


def test_only_its_owner_may_read_it_even_if_it_was_there_before(tmp_path: Path) -> None:
    file = tmp_path / "map.snapshot"
    file.write_text("old")
    file.chmod(0o644)
    before = os.umask(0)
    try:
        written(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = written(tmp_path)
    before = file.read_bytes()

    def failing() -> object:
        yield chunk_of(ROWS)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write(file, SAVED, failing())  # type: ignore[arg-type]
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (replace(PLACE, host="other.example.com"), "tenants"),
        (replace(PLACE, port=6432), "tenants"),
        (replace(PLACE, database="other"), "tenants"),
        (PLACE, "customers"),
    ],
)
def test_a_file_of_another_catalogue_or_map_is_not_used(
    tmp_path: Path, place: CataloguePlace, name: str
) -> None:
    with pytest.raises(SnapshotUnusable, match=r"the map tenants in .* map\.example\.com:5432/"):
        read(written(tmp_path), place, name)


def test_a_file_that_was_cut_or_damaged_anywhere_is_not_used(tmp_path: Path) -> None:
    file = written(tmp_path)
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at])
        with pytest.raises(SnapshotUnusable):
            read(file)
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        with pytest.raises(SnapshotUnusable):
            read(file)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "{}\n",
        "[]\n",
        "null\n",
        '{"format": 2}\n',
        '{"format": 1, "map": "' + "9" * 5000 + '"}\n',
        "9" * 5000 + "\n",
        '{"format": 1, "catalogue": 7}\n',
        "{" * 9,
    ],
)
def test_what_is_no_snapshot_is_not_used(tmp_path: Path, text: str) -> None:
    file = tmp_path / "map"
    file.write_text(text)
    with pytest.raises(SnapshotUnusable):
        read(file)


GARBAGE: tuple[object, ...] = (None, True, -1, 0, 10**400, 1.5, "x\n", "", "\ud800", [], {}, [[]])


def leaves(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield where each value in the first line is."""
    yield path
    items: Iterable[tuple[str | int, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for name, inner in items:
        yield from leaves(inner, (*path, name))


def replaced(value: Any, path: Sequence[str | int], garbage: object) -> Any:
    if not path:
        return garbage
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], garbage)
    return copy


def test_garbage_anywhere_in_the_first_line_is_no_other_exception_and_no_other_type(
    tmp_path: Path,
) -> None:
    """A version that was no number came as far as the metrics, and ended the map's task."""
    file = written(tmp_path, [])
    line, _, rest = file.read_bytes().partition(b"\n")
    head = json.loads(line)
    for path in leaves(head):
        for garbage in GARBAGE:
            spoiled = json.dumps(replaced(head, path, garbage)).encode() + b"\n" + rest[:-4]
            file.write_bytes(spoiled + crc32(spoiled).to_bytes(4))
            try:
                saved, _ = read(file)
            except SnapshotUnusable:
                continue
            assert type(saved.map.version) is int
            for shard in saved.shards:
                assert {type(getattr(shard, name)) for name in TEXTS} == {str}
                assert shard.name.isprintable()
                assert (type(shard.port), type(shard.version)) == (int, int)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")
    with pytest.raises(SnapshotUnusable, match="not a regular file"):
        read(Path("/dev/null"))


def test_an_empty_map_is_written_too(tmp_path: Path) -> None:
    assert read(written(tmp_path, [])) == (SAVED, [])
