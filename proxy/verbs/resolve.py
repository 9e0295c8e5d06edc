"""`resolve`: where a shard key leads, without connecting."""

import json
import os
from collections.abc import Sequence
from typing import Final

from proxy.config import load_settings
from proxy.errors import ProxyError
from proxy.exit_codes import EXIT_FAILURE, EXIT_OK
from proxy.server.router_factory import map_problems, resolution_facts, resolution_lines, router_of
from proxy.verbs.stderr import fail, wrong_usage

_JSON: Final = "--json"
_END_OF_FLAGS: Final = "--"


def run(arguments: Sequence[str]) -> int:
    """Print what the shard map says of a key. Raises ConfigurationError."""
    key, flags = _take_key(arguments)
    if key is None:
        return wrong_usage(
            "resolve needs a shard key in front of all flags, or behind --:"
            " lakebase-auth-proxy resolve KEY [flags]"
        )
    as_json, flags = _JSON in flags, [flag for flag in flags if flag != _JSON]
    settings = load_settings(flags, os.environ, inspect=[map_problems])
    try:
        found = router_of(settings).resolve(key)
    except ProxyError as error:
        return _refuse(error, as_json=as_json)
    if as_json:
        print(json.dumps({"ok": True, **resolution_facts(settings, found)}))
    else:
        print("\n".join(resolution_lines(settings, found)))
    return EXIT_OK


def _refuse(error: ProxyError, *, as_json: bool) -> int:
    answer = error.response()
    if as_json:
        words = {"sqlstate": answer.sqlstate, "reason": error.reason, "error": answer.message}
        print(json.dumps({"ok": False, **words}))
        return EXIT_FAILURE
    return fail(f"{answer.message} (SQLSTATE {answer.sqlstate}, {answer.text(b'D')})")


def _take_key(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the key, None if there is none, and the flags.

    A key may be negative: no flag begins with one dash. One that begins with two stands behind --.
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
