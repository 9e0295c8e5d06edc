"""Writes the manual page and the JSON schema of the file of settings: `python -m tests.generated`.

`test_generated` demands that the files are what this returns. Not for: `config.example.toml`, which
`proxy.config` writes, and the protocol's states.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from proxy.config import Settings, named_keys, settings_keys
from proxy.verbs import shards
from proxy.verbs.help import described, metavar_of
from proxy.verbs.syntax import PROGRAM, Syntax
from proxy.verbs.verb_table import VERBS

_DOCS: Final = Path(__file__).parents[1] / "docs"
# Not taken from pydantic: names that it makes from ours.
_DERIVED: Final = "title"
_EXIT_CODES: Final = {
    "0": "success, including a clean drain after SIGTERM or SIGINT",
    "1": "a failure while running",
    "2": "wrong usage, or a configuration that is not valid",
    "3": "the drain timed out, and sessions were cut",
    "4": "shards: an operation is left pending",
    "5": "shards verify: the catalogue and a shard differ",
    "other": "exec: the command's own (127: not found, 126: cannot be run)",
}


def schema() -> str:
    """Return the JSON schema of a file of settings, for editors.

    pydantic does not see what the model's own validators take besides: a list of hosts, numbers as
    bounds, the name of a target as an alias.
    """
    found = _without_derived(Settings.model_json_schema())
    sections = found["$defs"]
    host = sections["ListenSettings"]["properties"]["host"]
    host |= {"type": ["string", "array"], "items": {"type": "string"}}
    for name in ("key", "low", "high"):
        bound = sections["MappingEntry"]["properties"][name]
        bound["anyOf"] = [{"type": one} for one in ("string", "integer", "null")]
    aliases = found["properties"]["databases"]
    aliases["additionalProperties"] = {
        "anyOf": [{"type": "string"}, aliases["additionalProperties"]]
    }
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": PROGRAM}
    return json.dumps(head | found, indent=1, sort_keys=False) + "\n"


def _without_derived(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _without_derived(inner)
            for name, inner in value.items()
            if not (name == _DERIVED and isinstance(inner, str))
        }
    return [_without_derived(one) for one in value] if isinstance(value, list) else value


def manual() -> str:
    """Return the manual page, for man(1)."""
    return "\n".join(_manual()) + "\n"


def _manual() -> Iterator[str]:
    yield f'.TH {PROGRAM.upper()} 1 "" "" "User Commands"'
    yield ".SH NAME"
    yield f"{_roff(PROGRAM)} \\- log Postgres clients in to Databricks Lakebase"
    yield ".SH SYNOPSIS"
    yield rf".B {_roff(PROGRAM)}"
    yield _roff("VERB [--config FILE] [--SECTION.KEY VALUE ...]")
    yield ".SH VERBS"
    for syntax in VERBS.values():
        yield from _verb(syntax)
    yield ".SH VERBS OF SHARDS"
    yield _roff("Each takes --map NAME and --json, and those that write take --dry-run.")
    for verb in shards.VERBS.values():
        yield f".TP\n.B {_roff(verb.syntax.usage)}\n{_roff(verb.syntax.summary)}"
    yield ".SH SETTINGS"
    yield _roff(
        "Every key is a flag (--listen.port 6000), an environment variable"
        " (LAKEBASE_PROXY_LISTEN__PORT=6000) and a key of the TOML file that --config or"
        " LAKEBASE_PROXY_CONFIG names. A flag beats the environment, which beats the file."
    )
    section = ""
    for key in (*settings_keys(), *named_keys()):
        if key.section != section:
            section = key.section
            yield f".SS [{_roff(section)}]"
        yield f'.TP\n.BI {_roff(key.flag)} " {_roff(metavar_of(key))}"\n{_roff(described(key))}'
    yield ".SH EXIT STATUS"
    for code, text in _EXIT_CODES.items():
        yield f".TP\n.B {code}\n{_roff(text)}"


def _verb(syntax: Syntax) -> Iterator[str]:
    yield f".TP\n.B {_roff(syntax.usage)}\n{_roff(syntax.summary)}"
    for option in syntax.options:
        yield f'.RS\n.TP\n.BI {_roff(option.flag)} " {_roff(option.metavar)}"'
        yield f"{_roff(option.help)}\n.RE"


def _roff(text: str) -> str:
    """Return a text that roff shows as it is."""
    shown = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{shown}" if shown[:1] in (".", "'") else shown


GENERATED: Final[Mapping[Path, Callable[[], str]]] = {
    _DOCS / f"{PROGRAM}.1": manual,
    _DOCS / "settings.schema.json": schema,
}

if __name__ == "__main__":
    for file, text in GENERATED.items():
        file.write_text(text())
