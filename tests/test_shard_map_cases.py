"""docs/shard-maps.md and the tests are one list, and what the document says to write is taken."""

import re
from pathlib import Path
from typing import Final

import pytest

from proxy.catalogue.errors import Reason
from proxy.config import ShardMapSettings, load_settings
from proxy.errors import ErrorKind
from proxy.routing.keys import KEY_BYTES_MAX, KeyType, Normalise
from proxy.routing.shard_map import Kind
from proxy.server.router_factory import map_problems
from tests.support.cases import TESTS, files_of, named_files, numbered_tests
from tests.support.cases import rows as rows_of

DOCUMENT: Final = TESTS.parent / "docs" / "shard-maps.md"
ROWS: Final = rows_of(DOCUMENT, "S")
RACES: Final = 15


def test_every_case_that_has_a_test_has_a_row_and_every_row_has_tests() -> None:
    numbers = [number for number, _ in ROWS]
    assert numbers == sorted(set(numbers))
    assert numbers == sorted(numbered_tests("S"))


@pytest.mark.parametrize(("number", "cells"), ROWS, ids=[f"S{number}" for number, _ in ROWS])
def test_a_row_says_what_holds_and_names_the_files_with_its_tests(
    number: int, cells: list[str]
) -> None:
    holds, proven = cells
    assert holds
    assert named_files(proven) == files_of("S", number)


def test_s39_each_race_has_tests_by_its_number() -> None:
    assert sorted(numbered_tests("R")) == [*range(1, 1 + RACES)]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def test_the_configurations_of_the_document_are_taken(tmp_path: Path) -> None:
    (csv,) = blocks("csv")
    (tmp_path / "tenants.csv").write_text(csv)
    targets = "".join(
        f'[targets.{name}]\nendpoint = "projects/p/branches/b/endpoints/{name}"\n'
        for name in ("eu", "us")
    )
    examples = blocks("toml")
    assert len(examples) > 3
    for number, example in enumerate(examples):
        file = tmp_path / f"proxy{number}.toml"
        text = example.replace("/etc/lakebase-auth-proxy/tenants.csv", f"{tmp_path}/tenants.csv")
        file.write_text(targets + text if "[targets." not in text else text)
        settings = load_settings(["--config", str(file)], {}, inspect=[map_problems])
        assert settings.shard_maps or settings.databases or settings.workspaces


def test_every_kind_type_and_reason_is_in_the_document() -> None:
    text = DOCUMENT.read_text()
    kinds = [
        *(ErrorKind.KEY_MISSING, ErrorKind.KEY_CONFLICT, ErrorKind.KEY_TOO_LONG),
        *(ErrorKind.KEY_SYNTAX, ErrorKind.KEY_RANGE, ErrorKind.KEY_INVALID),
        *(ErrorKind.MAPPING_NOT_FOUND, ErrorKind.NO_TARGET),
    ]
    for kind in kinds:
        row = rf"^\| `{kind.value.reason}` \|.*\b{kind.value.sqlstate}\b"
        assert re.search(row, text, re.MULTILINE), kind
    for word in (*Kind, *KeyType, *Normalise, *ShardMapSettings.model_fields):
        assert f"`{word}`" in text, word
    assert f"{KEY_BYTES_MAX} bytes" in text


def test_every_reason_of_the_verbs_is_in_the_document_with_its_sqlstate() -> None:
    rows = re.findall(
        r"^\| (`[a-z_]+`(?:, `[a-z_]+`)*) \| ([0-9A-Z]{5}) \|", DOCUMENT.read_text(), re.MULTILINE
    )
    listed = {word: sqlstate for words, sqlstate in rows for word in re.findall(r"[a-z_]+", words)}
    for reason in Reason:
        assert listed.get(reason.value.word) == reason.value.sqlstate, reason
