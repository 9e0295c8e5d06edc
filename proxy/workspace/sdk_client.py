"""A client of databricks-sdk, configured for a server: with short waits, and isolated on demand.

For: the SDK's configuration. Not for: which calls are made (`client`), or their time limits
(`sdk_http`). All of it blocks, and importing the SDK takes more than a second, so that it is done
in a thread and only when it is needed.

The client of a named workspace is isolated: it takes nothing from the process's environment, which
belongs to `[workspace]`, and reads a profile only if one is named. It never logs in by a method
that its settings do not name (the machine's own Azure command, a notebook's token).
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from proxy.config import WorkspaceSettings
from proxy.config.validators import BLANKS
from proxy.errors import ErrorKind, ProxyError
from proxy.wire.secret import Secret
from proxy.workspace.login_settings import (
    check_identity_token,
    check_network,
    mistake,
    profile_values,
    sdk_arguments,
)
from proxy.workspace.sdk_http import REQUEST_SECONDS_MAX
from proxy.workspace.sdk_import import WorkspaceClient, skip_package_init

if TYPE_CHECKING:
    from databricks.sdk.clock import Clock
    from databricks.sdk.core import Config

_PRODUCT: Final = "lakebase-auth-proxy"
# The SDK checks its time budget only between tries, and it alone knows why the last one failed: its
# budget must end well before our own deadline.
_RETRY_PART: Final = 0.5
_PROBE_SECONDS_MAX: Final = 5.0
# The SDK's least: between the first and the second try it sleeps for longer.
_NO_RETRY_SECONDS: Final = 1

# The auth types of an isolated client and the settings that each needs, in the SDK's own order.
_AUTH_TYPES: Final = {
    "pat": ("token",),
    "oauth-m2m": ("client_id", "client_secret"),
    "env-oidc": ("oidc_token_env",),
    "file-oidc": ("oidc_token_filepath",),
    "azure-client-secret": ("azure_client_id", "azure_client_secret"),
    "databricks-cli": ("profile",),
    "google-id": ("google_service_account",),
}
# Those with which settings alone can be complete: the others need more than is a setting here.
_COMPLETE_BY_SETTINGS: Final = {
    "pat": ("token",),
    "oauth-m2m": ("client_id", "client_secret"),
    "env-oidc": ("client_id", "oidc_token_env"),
    "file-oidc": ("client_id", "oidc_token_filepath"),
    "azure-client-secret": ("azure_client_id", "azure_client_secret", "azure_tenant_id"),
}


class DiscoveryFailed(Exception):
    """The workspace does not serve its discovery document, which says where to log in."""


def connect(
    settings: WorkspaceSettings,
    file_secret: Secret | None,
    *,
    version: str,
    timeout_seconds: float,
    discover: bool,
    retries: bool = True,
) -> WorkspaceClient:
    """Return a client. It blocks, may make requests, and raises what the SDK raises.

    `file_secret` is the content of `client_secret_file`. Without `discover` the client is isolated,
    and so is one whose settings are complete: what lies about in the environment is not added.
    Without `retries` it does not try a failed call again.
    """
    retry_seconds = max(1, int(timeout_seconds * _RETRY_PART)) if retries else _NO_RETRY_SECONDS
    skip_package_init()
    _strip_identity_tokens()
    discover = discover and not _is_complete(settings, file_secret)
    config = (_discovering_config() if discover else _isolated_config())(
        clock=_fail_fast_clock(),
        product=_PRODUCT,
        product_version=version,
        http_timeout_seconds=min(REQUEST_SECONDS_MAX, timeout_seconds),
        retry_timeout_seconds=retry_seconds,
        **_given(settings, file_secret, discover=discover),
    )
    return WorkspaceClient(config)


def _given(
    settings: WorkspaceSettings, file_secret: Secret | None, *, discover: bool
) -> dict[str, Any]:
    """Return what is set; what is not set is not passed, so that the SDK can discover it."""
    secret = file_secret.reveal().decode() if file_secret else ""
    given = sdk_arguments(settings, secret, _variables() if discover else {}, os.environ)
    if not discover and not settings.profile:
        given["config_file"] = os.devnull
    return given


def _is_complete(settings: WorkspaceSettings, file_secret: Secret | None) -> bool:
    """Return whether the settings name a host, and all that one auth type needs."""
    wanted = [settings.auth_type] if settings.auth_type else [*_COMPLETE_BY_SETTINGS]
    known = [_COMPLETE_BY_SETTINGS[one] for one in wanted if one in _COMPLETE_BY_SETTINGS]
    given = {name for name, value in settings if value}
    given |= {"client_secret"} if file_secret else set()
    return "host" in given and any(given.issuperset(names) for names in known)


def _variables() -> dict[str, list[str]]:
    """Return the variables that the SDK reads for each of its settings."""
    from databricks.sdk.core import Config  # noqa: PLC0415 - imported by now

    return {
        attribute.name: [attribute.env, *getattr(attribute, "env_aliases", ())]
        for attribute in Config.attributes()
        if attribute.env
    }


@cache
def _strip_identity_tokens() -> None:
    """Remove what is harmless around the tokens of env-oidc and file-oidc.

    The SDK reads them again for each login, and has no other place for it.
    """
    from databricks.sdk import oidc  # noqa: PLC0415 - slow

    def stripping(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda source: oidc.IdToken(read(source).jwt.strip(BLANKS))

    sources: tuple[Any, ...] = (oidc.EnvIdTokenSource, oidc.FileIdTokenSource)
    for source in sources:
        source.id_token = stripping(source.id_token)


@cache
def _discovering_config() -> type["Config"]:
    from databricks.sdk.core import Config  # noqa: PLC0415 - imported by now

    Config.attributes()  # called on the class itself, because a subclass would find none

    known = frozenset(attribute.name for attribute in Config.attributes())

    class DiscoveringConfig(Config):
        """Discovers what is not given, as the SDK does.

        The overridden loaders are private, but the SDK offers no other method.
        """

        def _load_from_env(self) -> None:
            """Do nothing: what the environment sets was checked and given."""

        def _known_file_config_loader(self) -> None:
            self._load_profile()
            if self.host:
                check_network(self.host, os.environ)

        def _load_profile(self) -> None:
            if not self.profile and (
                self.is_any_auth_configured or self.host or self.azure_workspace_resource_id
            ):
                return
            values = profile_values(self.config_file or "", self.profile or "", known)
            for name, value in values.items():
                if name not in self._inner:
                    setattr(self, name, value)
            if values.keys() & {"oidc_token_env", "oidc_token_filepath"}:
                source = f"profile {self.profile or 'DEFAULT'}"
                check_identity_token(self._inner, source, os.environ)

        def init_auth(self) -> None:
            try:
                super().init_auth()  # type: ignore[no-untyped-call]
            except ValueError as error:
                _raise_cause(self, str(error))
                raise

    return DiscoveringConfig


@cache
def _isolated_config() -> type["Config"]:
    base: Any = _discovering_config()
    # Without it an identity of the environment would log in to a workspace it is not meant for.
    if not hasattr(base.__base__, "_load_from_env"):
        detail = "this version of databricks-sdk cannot isolate [workspaces.NAME]"
        raise ProxyError(ErrorKind.INTERNAL, detail)

    class IsolatedConfig(base):  # type: ignore[misc]
        """Uses what is given and, if a profile is named, what is in it."""

        def init_auth(self) -> None:
            self.auth_type: str = self.auth_type or _auth_type(self)
            super().init_auth()

    return IsolatedConfig


def _auth_type(config: "Config") -> str:
    for auth_type, needed in _AUTH_TYPES.items():
        if all(getattr(config, name) for name in needed):
            return auth_type
    raise ValueError("cannot configure default credentials: no auth type has all of its settings")


def _raise_cause(config: "Config", text: str) -> None:
    """Raise what the SDK's error does not tell, if there is anything."""
    # A discovery that failed is only logged by the SDK, and leads to this error.
    if config.host and "Invalid URL 'None'" in text:
        _raise_discovery_failure(config.host)
    if config.host and config.auth_type and "cannot configure default credentials" in text:
        raise _auth_type_mistake(config.auth_type, config)


def _auth_type_mistake(auth_type: str, config: "Config") -> ProxyError:
    """Return the error for an auth type that cannot be used with what else is set."""
    source = "workspace.auth_type (DATABRICKS_AUTH_TYPE)"
    needed = _COMPLETE_BY_SETTINGS.get(auth_type)
    if needed is None:
        return mistake(source, f"it is none of {', '.join(_AUTH_TYPES)}, or is not complete")
    missing = [name for name in needed if not getattr(config, name, None)]
    return mistake(source, f"{auth_type} needs {' and '.join(missing) or 'more'}")


def _raise_discovery_failure(host: str) -> None:
    """Request the discovery document once more, and raise why there is none."""
    import requests  # noqa: PLC0415 - imported by now

    reply = requests.get(f"{host}/.well-known/databricks-config", timeout=_PROBE_SECONDS_MAX)
    text = "the workspace does not say where to log in"
    raise DiscoveryFailed(text if reply.ok else f"{text}: HTTP {reply.status_code} {reply.text}")


@cache
def _fail_fast_clock() -> "Clock":
    """Return a clock for the SDK that raises the failure in place of sleeping for a Retry-After.

    For the SDK every 429 and 503 has one. All callers have to wait for it (the failure carries it);
    one thread that sleeps through it would only look like a call without an answer.
    """
    from databricks.sdk.clock import RealClock  # noqa: PLC0415 - imported by now

    class FailFastClock(RealClock):
        def sleep(self, seconds: float) -> None:
            failure = sys.exception()  # after which the SDK wants to try again
            if getattr(failure, "retry_after_secs", None) is not None and failure is not None:
                raise failure
            super().sleep(seconds)

    return FailFastClock()
