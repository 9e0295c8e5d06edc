"""One line for the person who has started the proxy: where to connect, as whom, and to which host.

For: a log that people read. In JSON the line `serving` has the addresses, and identity and host are
asked for with the first session: a fleet that starts must not cost the workspace two calls more.
"""

from contextlib import suppress

from proxy.errors import ProxyError
from proxy.observe.logs import get_logger, is_for_people
from proxy.server.app import App
from proxy.session.listen_sockets import shown
from proxy.upstream.address_lookup import ANY_USER
from proxy.wire.startup import V3_0, StartupMessage

_log = get_logger(__name__)


async def greet(app: App) -> None:
    """Log the greeting, with what the workspace tells of identity and host."""
    if is_for_people(app.settings.log.format):
        _log.info(greeting(app, *await _identity_and_host(app)))


async def _identity_and_host(app: App) -> tuple[str, str]:
    """Return what is known of the usual target, empty where the workspace does not tell."""
    lookup = app.snapshot.upstreams[app.target_names()[0]].address_lookup
    with suppress(ProxyError):  # the first session is told why
        host = (await lookup.target()).host
        names = await lookup.login_names(StartupMessage(V3_0, ()))
        return names.user.decode(), host
    return "", lookup.host


def greeting(app: App, identity: str, host: str) -> str:
    """Return the greeting. What is not known is left out."""
    settings, first = app.settings, app.target_names()[0]
    others = len(app.target_names()) - 1
    if settings.target(first).user == ANY_USER:
        identity = "the user that each client names"
    if settings.catalogue_map:
        host = f"the shards of {settings.catalogue_map}"
    elif host and others:
        host = f"{host} and {others} more"
    text = "Listening on " + " and ".join(map(shown, app.listen_addresses))
    text += f" as {identity}" if identity else ""
    text += f" to {host}" if host else ""
    if app.admin is not None:
        text += f" (page: http://{shown((app.admin.host, app.admin.port))}/)"
    return text
