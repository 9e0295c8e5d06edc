"""`resolve`: print where a shard key leads, without connecting.

A URL has the key in `options`, percent-encoded: a key in the database's name is read in different
ways. SQLAlchemy and tokio-postgres take what follows a bare @ for the host, and drivers of Node
and SQLAlchemy 2.0 do not decode %40.
"""

import json
import os

from proxy.addresses import address_of
from proxy.config import ListenSettings, Settings, load_settings
from proxy.errors import ProxyError
from proxy.exit_codes import EXIT_FAILURE, EXIT_OK
from proxy.routing.router import Resolution
from proxy.server.router_factory import map_problems, router_of
from proxy.verbs.child_environment import client_options, client_user, connection_url
from proxy.verbs.stderr import fail
from proxy.verbs.syntax import Arguments
from proxy.verbs.verb_table import URL


def run(arguments: Arguments) -> int:
    """Print what the shard map says of a key. Raises ConfigurationError."""
    (key,) = arguments.words
    settings = load_settings(arguments.flags, os.environ, inspect=[map_problems])
    try:
        if settings.catalogue_map:
            from proxy.verbs.resolve_in_catalogue import resolve  # noqa: PLC0415 - seconds

            facts = resolve(settings, key)
        else:
            facts = _facts(settings, router_of(settings).resolve(key))
    except ProxyError as error:
        return _refuse(error, as_json=arguments.as_json)
    facts["url"] = _url(settings, key, facts["database"])
    if arguments.as_json:
        print(json.dumps({"ok": True, **facts}))
    else:
        print(facts["url"] if arguments.has(URL) else _table(facts))
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


def _url(settings: Settings, key: str, database: str) -> str:
    """Return the URL with which a client on this machine connects to the shard of a key."""
    listen, user = settings.listen, client_user(settings, {})
    return connection_url(_host(listen), listen.port, user, database, client_options({}, key))


def _host(listen: ListenSettings) -> str:
    """Return a host where the listener can be reached, or its unix socket's directory."""
    host = next(iter(listen.hosts), listen.unix_socket_directory)
    address = address_of(host)
    is_any = host == "*" or (address is not None and address.is_unspecified)
    return "localhost" if is_any else host


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
