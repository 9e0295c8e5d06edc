"""What a run found of each client: `record.json` in the folder of its language, or of the tools.

It is written only where the variable CLIENTS_RECORD is set, as `make clients` does. docs/clients.md
is made of these files (`document`).
"""

import datetime
import json
import os
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from tests.clients.registry import ROOT, TOOLS

VARIABLE: Final = "CLIENTS_RECORD"
TOOL_CELL: Final = "runs"
PASSED: Final = "✓"


def record(folder: Path, name: str, version: str, cells: Mapping[str, str]) -> None:
    """Record what a client did, by its checks."""
    if os.environ.get(VARIABLE):
        found = {"version": version, "cells": dict(cells), "run": _today_and_commit()}
        every = recorded(folder) | {name: found}
        text = json.dumps(every, indent=1, sort_keys=True, ensure_ascii=False)
        (folder / "record.json").write_text(text + "\n")


def record_tool(name: str, version: str) -> None:
    """Record that a tool did what `tools.toml` says of it: the last line of its test."""
    record(TOOLS, name, version, {TOOL_CELL: PASSED})


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what is recorded, by name."""
    file = folder / "record.json"
    found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    return found


@cache
def _today_and_commit() -> str:
    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return f"{datetime.datetime.now(datetime.UTC).date()} at commit {commit.strip()}"
