"""The settings model: all sections in one frozen `Settings`, and what follows from all together.

For: `Settings`, the effective values of a target, and warnings. A new key is one `Field` in a
section (`server_sections`, `upstream_sections`, `routing_sections`): flags, environment, file and
`config.example.toml` follow from it. Not for: reading sources (`sources`), what one key requires of
another (`cross_checks`), or acting on a setting.

Invariant: a `Settings` depends on its arguments alone, and its repr shows no secret.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Final, Self

from pydantic import AfterValidator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from proxy.addresses import is_loopback
from proxy.config.catalogue_section import CatalogueSettings
from proxy.config.routing_sections import DatabaseAlias, RoutingSettings, ShardMapSettings
from proxy.config.server_sections import (
    AdminSettings,
    ListenSettings,
    LogSettings,
    ReloadSettings,
    ShutdownSettings,
    StartupSettings,
)
from proxy.config.upstream_sections import (
    ADDRESS_KEYS,
    CredentialsSettings,
    UpstreamSettings,
    WorkspaceSettings,
)
from proxy.config.validators import check_alias, check_name

# The name of [upstream] as a target.
UPSTREAM: Final = "upstream"

# Clients that wait for a mapping, if the configuration does not say how many: each keeps its
# connection slot, so they leave most of them to others.
_PARK_MAX: Final = 100


def _check_target_name(value: str) -> str:
    if value == UPSTREAM:
        raise ValueError("must have another name: upstream is the section [upstream]")
    return check_name(value)


def upstream_is_target(
    upstream: Mapping[str, object], *, alone: bool, keyless: bool, named: Iterable[object]
) -> bool:
    """Return whether sessions can be sent to `[upstream]` itself, given its values.

    It always provides what targets do not set. It is a target itself when it says where to dial,
    when no other target exists (`alone`), when sessions without a shard key go there (`keyless`),
    or when an alias or a mapping names it (`named`: the targets that they name).
    """
    has_address = any(upstream.get(key) for key in ADDRESS_KEYS)
    return alone or has_address or keyless or UPSTREAM in named


Name = Annotated[str, AfterValidator(check_name)]
TargetName = Annotated[str, AfterValidator(_check_target_name)]
AliasName = Annotated[str, AfterValidator(check_alias)]


class Settings(BaseSettings):
    """All settings, validated and frozen. `load_settings` creates them; tests use keywords."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        case_sensitive=True,
        hide_input_in_errors=True,
    )

    listen: ListenSettings = ListenSettings()
    admin: AdminSettings = AdminSettings()
    workspace: WorkspaceSettings = WorkspaceSettings()
    workspaces: dict[Name, WorkspaceSettings] = {}
    credentials: CredentialsSettings = CredentialsSettings()
    upstream: UpstreamSettings = UpstreamSettings()
    targets: dict[TargetName, UpstreamSettings] = {}
    databases: dict[AliasName, DatabaseAlias] = {}
    routing: RoutingSettings = RoutingSettings()
    shard_maps: dict[Name, ShardMapSettings] = {}
    catalogue: CatalogueSettings = CatalogueSettings()
    startup: StartupSettings = StartupSettings()
    shutdown: ShutdownSettings = ShutdownSettings()
    reload: ReloadSettings = ReloadSettings()
    log: LogSettings = LogSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use keywords only, so that no `Settings` depends on the process's environment."""
        return (init_settings,)

    def target_names(self) -> tuple[str, ...]:
        """Return the targets that sessions can be sent to, `upstream` first if it is one."""
        with_upstream = upstream_is_target(
            dict(self.upstream),
            alone=not self.targets,
            keyless=bool(self.routing.shard_map) and not self.routing.require_key,
            named=self._named_targets(),
        )
        return (UPSTREAM, *self.targets) if with_upstream else tuple(self.targets)

    def target(self, name: str) -> UpstreamSettings:
        """Return the effective values of a target. Raises KeyError for an unknown name."""
        return self.upstream if name == UPSTREAM else self.targets[name].inheriting(self.upstream)

    def with_targets(self, change: Callable[[UpstreamSettings], UpstreamSettings]) -> Self:
        """Return these settings with `change` made to the effective values of each target."""
        targets = {name: change(self.target(name)) for name in self.targets}
        return self.model_copy(update={"upstream": change(self.upstream), "targets": targets})

    def workspace_of(self, target: UpstreamSettings) -> WorkspaceSettings:
        """Return the workspace that issues the tokens for a target with these effective values.

        Targets of the same workspace share its tokens.
        """
        if not target.workspace:
            return self.workspace
        named, ca_file = self.workspaces[target.workspace], self.workspace.ssl_root_cert
        if named.ssl_root_cert or not ca_file:
            return named
        return named.model_copy(update={"ssl_root_cert": ca_file})

    def warnings(self) -> list[str]:
        """Return a sentence for each setting that is allowed but risky."""
        return [
            *self._remote_listener_warnings(),
            *self._tls_warnings(),
            *self._timeout_warnings(),
            *self._validation_warnings(),
        ]

    @property
    def catalogue_map(self) -> str:
        """The map that sessions are routed by, if it is in the catalogue; else empty."""
        name = self.routing.shard_map
        return name if name and self.shard_maps[name].catalogue else ""

    @property
    def park_max(self) -> int:
        """The number of clients that may wait at a time for mappings that are offline."""
        half = self.listen.max_connections // 2
        return self.catalogue.park_max or min(_PARK_MAX, half)

    def _named_targets(self) -> Iterator[str]:
        """Yield the target of the catalogue, and of each alias and mapping."""
        if self.catalogue.target:
            yield self.catalogue.target
        yield from (alias.target for alias in self.databases.values())
        for shard_map in self.shard_maps.values():
            yield from (entry.target for entry in shard_map.mappings)

    def _remote_listener_warnings(self) -> Iterator[str]:
        host = ", ".join(host for host in self.listen.hosts if not is_loopback(host))
        if host:
            yield (
                f"listen.host {host} is not loopback: any client that can reach it is logged in"
                " without a password"
            )

    def _tls_warnings(self) -> Iterator[str]:
        for name in self.target_names():
            target = self.target(name)
            key = target_key(name, "sslmode")
            if target.sslmode == "verify-ca":
                yield (
                    f"{key} verify-ca does not compare the host name: someone in the network path"
                    " with a certificate of the same authority can read the token"
                )
            elif target.sslmode == "require":
                yield (
                    f"{key} require verifies no certificate: someone in the network path can read"
                    " the token"
                )

    def _timeout_warnings(self) -> Iterator[str]:
        mint_seconds = self.credentials.mint_timeout_seconds
        for name in () if self.credentials.password_file else self.target_names():
            seconds = self.target(name).connect_timeout_seconds
            if seconds < mint_seconds:
                yield (
                    f"{target_key(name, 'connect_timeout_seconds')} {seconds:g} is less than"
                    f" credentials.mint_timeout_seconds {mint_seconds:g}: one call to the workspace"
                    " API that hangs can make all new sessions time out"
                )

    def _validation_warnings(self) -> Iterator[str]:
        if self.catalogue_map and not self.catalogue.validate:
            yield (
                "catalogue.validate is false: for a while after a change of the shard map, sessions"
                " reach the shard that had the key before"
            )


def target_key(target: str, key: str) -> str:
    """Return the dotted key of a target, as in `targets.eu.port` or `upstream.port`."""
    return f"{target if target == UPSTREAM else f'targets.{target}'}.{key}"
