"""The snapshot file: it comes back as it was written, or is not used."""

import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.catalogue.model import CatalogueMap, Mapping, Status
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


def read(file: Path, place: CataloguePlace = PLACE, name: str = "tenants") -> object:
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
        '{"format": 1, "catalogue": 7}\n',
        "{" * 9,
    ],
)
def test_what_is_no_snapshot_is_not_used(tmp_path: Path, text: str) -> None:
    file = tmp_path / "map"
    file.write_text(text)
    with pytest.raises(SnapshotUnusable):
        read(file)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")
    with pytest.raises(SnapshotUnusable, match="not a regular file"):
        read(Path("/dev/null"))


def test_an_empty_map_is_written_too(tmp_path: Path) -> None:
    assert read(written(tmp_path, [])) == (SAVED, [])
