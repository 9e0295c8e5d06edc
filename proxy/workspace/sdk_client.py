"""A client of databricks-sdk, made so that it suits a server: impatient, and closed on demand.

For: what the SDK is configured with. Not for: which calls are made (`workspace`), nor their time
limits (`exchange`). Everything here blocks; the SDK takes more than a second to import, so that
this is done in a thread, and only once it is needed.

A client for a named workspace is closed: it finds nothing in the process's environment, which
belongs to `[workspace]`, and reads a profile only if one is named. A login that none of its
settings asks for (the machine's own Azure command, a notebook's token) is none of its ways.
"""

import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from pydantic import SecretStr

from proxy.config import WorkspaceSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.wire.secret import Secret
from proxy.workspace.sdk_http import REQUEST_SECONDS_MAX
from proxy.workspace.sdk_import import WorkspaceClient, skip_package_init

if TYPE_CHECKING:
    from databricks.sdk.clock import Clock
    from databricks.sdk.core import Config

_PRODUCT: Final = "lakebase-auth-proxy"
# The SDK looks at its budget only between tries, and only it knows what the last one failed with:
# its budget must be spent well before our own deadline.
_RETRY_PART: Final = 0.5
_PROBE_SECONDS_MAX: Final = 5.0

# What a closed client logs in with, by what is set; the SDK's own order.
_AUTH_TYPES: Final = {
    "pat": ("token",),
    "oauth-m2m": ("client_id", "client_secret"),
    "env-oidc": ("oidc_token_env",),
    "file-oidc": ("oidc_token_filepath",),
    "azure-client-secret": ("azure_client_id", "azure_client_secret"),
    "databricks-cli": ("profile",),
    "google-id": ("google_service_account",),
}


class DiscoveryFailed(Exception):
    """The workspace does not say where to log in."""


def connect(
    settings: WorkspaceSettings,
    file_secret: Secret | None,
    *,
    version: str,
    timeout_seconds: float,
    discover: bool,
) -> WorkspaceClient:
    """Return a client. It blocks, may make requests, and raises what the SDK raises.

    `file_secret` is what `client_secret_file` holds. Without `discover` the client is closed.
    """
    skip_package_init()
    # The settings have the SDK's own names, but for the file.
    given: dict[str, Any] = {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value
        for name, value in settings
        if name != "client_secret_file"
    }
    if file_secret:
        given["client_secret"] = file_secret.reveal().decode()
    if not discover and not settings.profile:
        given["config_file"] = os.devnull
    config = (_discovering_config() if discover else _isolated_config())(
        clock=_fail_fast_clock(),
        product=_PRODUCT,
        product_version=version,
        http_timeout_seconds=min(REQUEST_SECONDS_MAX, timeout_seconds),
        retry_timeout_seconds=max(1, int(timeout_seconds * _RETRY_PART)),
        # What is not set is not passed: the SDK looks for it in its own places.
        **{name: value for name, value in given.items() if value},
    )
    return WorkspaceClient(config)


@cache
def _discovering_config() -> type["Config"]:
    from databricks.sdk.core import Config  # noqa: PLC0415 - imported by now

    Config.attributes()  # of the class itself: a subclass would find none

    class DiscoveringConfig(Config):
        """Looks in the SDK's own places for what is not given."""

        def init_auth(self) -> None:
            try:
                super().init_auth()  # type: ignore[no-untyped-call]
            except ValueError as error:
                # What becomes of a discovery that failed, which is only warned of.
                if self.host and "Invalid URL 'None'" in str(error):
                    _raise_discovery_failure(self.host)
                raise

    return DiscoveringConfig


@cache
def _isolated_config() -> type["Config"]:
    base: Any = _discovering_config()
    # Private, but the SDK has no other way. Without it an identity of the environment's would
    # log in to a workspace that it is not meant for.
    if not hasattr(base, "_load_from_env"):
        detail = "this version of databricks-sdk does not let [workspaces.NAME] be kept apart"
        raise ProxyError(ErrorKind.INTERNAL, detail)

    class IsolatedConfig(base):  # type: ignore[misc]
        """Has what is given and, if a profile is named, what is in that."""

        def _load_from_env(self) -> None:
            pass

        def init_auth(self) -> None:
            self.auth_type: str = self.auth_type or _auth_type(self)
            super().init_auth()

    return IsolatedConfig


def _auth_type(config: "Config") -> str:
    for auth_type, needed in _AUTH_TYPES.items():
        if all(getattr(config, name) for name in needed):
            return auth_type
    raise ValueError("cannot configure default credentials: its section has none that are whole")


def _raise_discovery_failure(host: str) -> None:
    """Ask for the discovery document once more, to hear why there is none. Raises it."""
    import requests  # noqa: PLC0415 - imported by now

    reply = requests.get(f"{host}/.well-known/databricks-config", timeout=_PROBE_SECONDS_MAX)
    text = "the workspace does not say where to log in"
    raise DiscoveryFailed(text if reply.ok else f"{text}: HTTP {reply.status_code} {reply.text}")


@cache
def _fail_fast_clock() -> "Clock":
    """Return a clock for the SDK, which does not sleep where the other side has said for how long.

    To the SDK a 429 or a 503 always says it. It is for everybody to heed (the failure carries it),
    not for one thread to sleep through: that would end as a call without an answer.
    """
    from databricks.sdk.clock import RealClock  # noqa: PLC0415 - imported by now

    class FailFastClock(RealClock):
        def sleep(self, seconds: float) -> None:
            failure = sys.exception()  # after which the SDK wants to try again
            if getattr(failure, "retry_after_secs", None) is not None and failure is not None:
                raise failure
            super().sleep(seconds)

    return FailFastClock()
