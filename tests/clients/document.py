"""Writes docs/clients.md from what the last runs recorded: `python -m tests.clients.document`.

Names and checks come from the registry, versions and results from the records.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from tests.clients.record import PASSED, TOOL_CELL, recorded
from tests.clients.registry import CHECKS, ROOT, TOOLS, Client, Language, languages, tools

DOCUMENT: Final = ROOT / "docs" / "clients.md"
NOT_RUN: Final = "not run"
_CANNOT: Final = "no"

_INTRODUCTION: Final = """# Clients

Drivers, pools and tools that were run through the proxy. `make clients` runs all of them again and
writes this document.

Each driver has a small program in [tests/clients](../tests/clients/registry.py), with the ordinary
pool of its language and nothing about tokens. It runs twice, directly on PostgreSQL and through the
proxy, and must print the same. ✓: it did. "{cannot}": the driver cannot do it, with or without the
proxy; the lines below the table say why. The database is PostgreSQL 16 and the project's
[Lakebase emulator](../README.md#try-it), not a live workspace.

| check | what must be so |
|---|---|"""

Recorded = Mapping[str, Mapping[str, Any]]


def document() -> str:
    """Return the document."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _INTRODUCTION.format(cannot=_CANNOT)
    for check, text in CHECKS.items():
        yield f"| {check} | {text} |"
    for language in languages():
        found = recorded(language.folder)
        yield f"\n## {language.name}\n\n{_runs(found)}\n"
        yield f"| driver and pool | version | {' | '.join(CHECKS)} |"
        yield "|---|---|" + "---|" * len(CHECKS)
        yield from _rows(language, found)
    found = recorded(TOOLS)
    if tools():
        yield f"\n## Tools\n\n{_runs(found)}\n"
        yield "| tool | version | what it did | |\n|---|---|---|---|"
    for tool in tools():
        one = found.get(tool.name, {"version": "", "cells": {TOOL_CELL: NOT_RUN}})
        said = f"not tried: {tool.not_tried}" if tool.not_tried else one["cells"][TOOL_CELL]
        yield f"| {tool.name} | {one['version']} | {tool.does} | {said} |"


def _runs(found: Recorded) -> str:
    """Return when the clients of a table ran."""
    runs = sorted({one["run"] for one in found.values()})
    return f"Run on {', '.join(runs)}." if runs else "None of them was tried."


def _rows(language: Language, found: Recorded) -> Iterator[str]:
    notes = []
    for client in language.clients:
        one = found.get(client.name, {"version": "", "cells": {}})
        cells = _cells(client, one["cells"])
        yield f"| {client.name} | {one['version']} | {' | '.join(cells)} |"
        said = {check: text for check, text in one["cells"].items() if _cell(text) != text}
        notes += [f"- {client.name}, {check}: {text}." for check, text in said.items()]
        if client.not_tried:
            notes.append(f"- {client.name} was not tried: {client.not_tried}.")
    if notes:
        yield "\n" + "\n".join(notes)


def _cells(client: Client, cells: Mapping[str, str]) -> Iterator[str]:
    for check in CHECKS:
        if client.not_tried:
            yield "not tried"
        else:
            yield _cell(cells[check]) if check in cells else NOT_RUN


def _cell(said: str) -> str:
    return said if said == PASSED or said.startswith("message") else _CANNOT


if __name__ == "__main__":
    DOCUMENT.write_text(document())
