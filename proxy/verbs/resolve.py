"""`resolve`: print where a shard key leads, without connecting."""

import json
import os
from collections.abc import Sequence
from typing import Final

from proxy.config import Settings, load_settings
from proxy.errors import ProxyError
from proxy.exit_codes import EXIT_FAILURE, EXIT_OK
from proxy.routing.router import Resolution
from proxy.server.router_factory import map_problems, router_of
from proxy.verbs.stderr import fail, wrong_usage

_JSON: Final = "--json"
_END_OF_FLAGS: Final = "--"


def run(arguments: Sequence[str]) -> int:
    """Print what the shard map says of a key. Raises ConfigurationError."""
    key, flags = _take_key(arguments)
    if key is None:
        return wrong_usage(
            "resolve needs a shard key before all flags, or after --:"
            " lakebase-auth-proxy resolve KEY [flags]"
        )
    as_json, flags = _JSON in flags, [flag for flag in flags if flag != _JSON]
    settings = load_settings(flags, os.environ, inspect=[map_problems])
    try:
        if settings.catalogue_map:
            from proxy.verbs.resolve_in_catalogue import resolve  # noqa: PLC0415 - seconds

            facts = resolve(settings, key)
        else:
            facts = _facts(settings, router_of(settings).resolve(key))
    except ProxyError as error:
        return _refuse(error, as_json=as_json)
    print(json.dumps({"ok": True, **facts}) if as_json else _table(facts))
    return EXIT_OK


def _facts(settings: Settings, found: Resolution) -> dict[str, str]:
    """Return what `--json` prints. What does not apply is empty."""
    target = settings.target(found.target)
    return {
        "canonical_key": found.key,
        "hash": found.hash,
        "low": found.low,
        "high": found.high,
        "target": found.target,
        "endpoint": target.endpoint or target.instance,
        "host": target.host,
        "database": target.database,
    }


def _table(facts: dict[str, str]) -> str:
    """Return the lines for people: the key, the mapping that has it, and where that leads."""
    low, high = facts["low"], facts["high"]
    rows = [
        ("canonical key", facts["canonical_key"]),
        ("hash", facts["hash"]),
        ("mapping", low if low == high else f"[{low}, {high})"),
        ("target", facts["target"]),
        ("host", facts["host"] or f"looked up from {facts['endpoint']}"),
        ("database", facts["database"]),
    ]
    return "\n".join(f"{name:<14} {value}" for name, value in rows if value)


def _refuse(error: ProxyError, *, as_json: bool) -> int:
    answer = error.response()
    if as_json:
        words = {"sqlstate": answer.sqlstate, "reason": error.reason, "error": answer.message}
        print(json.dumps({"ok": False, **words}))
        return EXIT_FAILURE
    return fail(f"{answer.message} (SQLSTATE {answer.sqlstate}, {answer.text(b'D')})")


def _take_key(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the key, or None if there is none, and the flags.

    A key may begin with one dash, as no flag does. One that begins with two must come after --.
    """
    rest = list(arguments)
    if _END_OF_FLAGS in rest:
        at = rest.index(_END_OF_FLAGS)
        del rest[at]
    else:
        at = 1 if rest[:1] == [_JSON] else 0  # the one flag without a value
        if rest[at : at + 1] and rest[at].startswith("--"):
            return None, rest
    return (rest.pop(at) if at < len(rest) else None), rest
