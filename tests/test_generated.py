"""The manual page and the schema: they are current, and say what is accepted."""

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from proxy.verbs.verb_table import VERBS
from tests.generated import GENERATED, manual, schema
from tests.support.tools import need

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("file", GENERATED, ids=lambda file: file.name)
def test_what_is_generated_is_current(file: Path) -> None:
    assert file.read_text() == GENERATED[file](), "run `make docs`"


def refused(text: str) -> list[str]:
    """Return the paths of what the schema does not accept."""
    validator: Any = jsonschema.Draft202012Validator(json.loads(schema()))
    return sorted(error.json_path for error in validator.iter_errors(tomllib.loads(text)))


def test_the_schema_accepts_the_example_with_every_key() -> None:
    example = (ROOT / "config.example.toml").read_text()
    for text in (example, re.sub(r"^#(?=\S)", "", example, flags=re.MULTILINE)):
        assert refused(text) == []


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ('[listen]\nhost = ["127.0.0.1", "::1"]', []),
        ('[databases]\na = "eu"\nb = { target = "eu" }', []),
        ("[listen]\nport = 70000", ["$.listen.port"]),
        ("[listen]\nprot = 1", ["$.listen"]),
        ('[upstream]\nsslmode = "prefer"', ["$.upstream.sslmode"]),
        ("[targets.eu]\nport = 0", ["$.targets.eu.port"]),
    ],
)
def test_the_schema_knows_what_is_wrong(text: str, paths: list[str]) -> None:
    assert refused(text) == paths


def test_the_manual_has_every_verb() -> None:
    for name in VERBS:
        assert f"\n.B {name}" in manual()


def test_the_manual_is_formatted_without_a_warning() -> None:
    need("the format of the manual page", "groff")
    ran = subprocess.run(
        ["groff", "-ww", "-man", "-Tascii"],
        input=manual(),
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    assert ran.stderr == ""
