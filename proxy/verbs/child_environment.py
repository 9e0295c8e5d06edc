"""How a client reaches a proxy: the environment of a command beside its own proxy, and a URL.

For: `exec`, and `resolve --url`. Not for: starting the command (`child_process`).

Invariant: the command gets nothing that the proxy logs in with, and no variable that would lead
libpq somewhere else or require of the proxy what only the upstream has.
"""

from collections.abc import Mapping
from typing import Final
from urllib.parse import quote, urlencode

from proxy.config import Settings
from proxy.config.setting_keys import ENVIRONMENT_PREFIX
from proxy.routing.key_sources import BUILT_IN_PARAMETER
from proxy.wire.options import Setting, appended
from proxy.workspace.login_variables import without_login

DEFAULT_USER: Final = "app"
OPTIONS_VARIABLE: Final = "PGOPTIONS"
_ANY_USER: Final = "*"

# What libpq would prefer to PGHOST, what it would refuse because the proxy asks for no password and
# no TLS, and the passwords.
_LIBPQ: Final = frozenset(
    (
        *("PGHOSTADDR", "PGSERVICE", "PGPASSWORD", "PGPASSFILE", "PGREQUIREAUTH", "PGGSSENCMODE"),
        *("PGREQUIRESSL", "PGCHANNELBINDING", "PGSSLNEGOTIATION", "PGSSLROOTCERT", "PGSSLCERT"),
        *("PGSSLKEY", "PGSSLCRL", "PGSSLCRLDIR", "PGSSLCERTMODE"),
    )
)


def client_user(settings: Settings, environ: Mapping[str, str]) -> str:
    """Return the user that the command logs in as; any will do unless `upstream.user` is "*"."""
    user = settings.upstream.user
    return user if user not in ("", _ANY_USER) else environ.get("PGUSER") or DEFAULT_USER


def client_database(settings: Settings) -> str:
    """Return the database of the target of a client that names nothing."""
    return settings.target(settings.target_names()[0]).database


def client_options(environ: Mapping[str, str], shard_key: str | None) -> str:
    """Return `options` of the StartupMessage: those of the environment, with the shard key."""
    options = environ.get(OPTIONS_VARIABLE, "")
    if shard_key is None:
        return options
    key = Setting(BUILT_IN_PARAMETER, shard_key.encode())
    return appended(options.encode(), [key]).decode()


def child_environment(
    environ: Mapping[str, str],
    settings: Settings,
    *,
    host: str,
    port: int,
    options: str,
) -> dict[str, str]:
    """Return the command's environment. `host` may be the directory of a unix socket."""
    user, database = client_user(settings, environ), client_database(settings)
    kept = {
        name: value
        for name, value in without_login(environ, settings).items()
        if name not in _LIBPQ and not name.startswith(ENVIRONMENT_PREFIX)
    }
    return {
        **kept,
        **({OPTIONS_VARIABLE: options} if options else {}),
        "PGHOST": host,
        "PGPORT": str(port),
        "PGUSER": user,
        "PGDATABASE": database,
        "PGSSLMODE": "disable",
        "DATABASE_URL": connection_url(host, port, user, database, options),
    }


def connection_url(host: str, port: int, user: str, database: str, options: str) -> str:
    """Return a URL that every driver reads alike. `host` may be the directory of a unix socket."""
    query = {"sslmode": "disable", **({"options": options} if options else {})}
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if host.startswith("/"):  # the form of a unix socket that most drivers read
        place, query = "", {"host": host, "port": str(port), **query}
    # Not +, which libpq does not read as a space.
    shown = urlencode(query, quote_via=quote, safe="/")
    return f"postgresql://{quote(user, safe='')}@{place}/{quote(database, safe='')}?{shown}"
