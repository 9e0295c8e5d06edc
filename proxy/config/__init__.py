"""Every setting of the proxy: flags, environment and file, merged into one frozen `Settings`.

Each fact about a key is stated once, in the model: its type, bounds, default, reason, whether a
change needs a restart, and whether it names a file to watch. Everything else reads it from there.
"""

from proxy.config.catalogue_section import ANY_LABELS, CatalogueSettings
from proxy.config.config_errors import ConfigurationError, Problem
from proxy.config.diff import (
    Changes,
    Files,
    compare,
    lost_secrets,
    named_files,
    with_running_values,
)
from proxy.config.example import example_toml
from proxy.config.loading import Configuration, Inspect, load, load_settings
from proxy.config.printing import effective_toml
from proxy.config.routing_sections import (
    DatabaseAlias,
    MappingEntry,
    RoutingSettings,
    ShardMapSettings,
)
from proxy.config.server_sections import (
    AdminSettings,
    ListenSettings,
    LogSettings,
    ReloadSettings,
    ShutdownSettings,
    StartupSettings,
)
from proxy.config.setting_keys import SettingKey, key_at, named_keys, settings_keys
from proxy.config.settings import UPSTREAM, Settings, target_key
from proxy.config.sources import config_file, take_flags
from proxy.config.upstream_sections import (
    CredentialsSettings,
    PoolMode,
    SslMode,
    UpstreamSettings,
    WorkspaceSettings,
)
from proxy.config.validation_errors import likely_flags

__all__ = [
    "Settings",
    "ListenSettings",
    "AdminSettings",
    "WorkspaceSettings",
    "CredentialsSettings",
    "UpstreamSettings",
    "UPSTREAM",
    "target_key",
    "DatabaseAlias",
    "RoutingSettings",
    "ShardMapSettings",
    "MappingEntry",
    "CatalogueSettings",
    "ANY_LABELS",
    "ShutdownSettings",
    "ReloadSettings",
    "StartupSettings",
    "LogSettings",
    "PoolMode",
    "SslMode",
    "load",
    "load_settings",
    "Configuration",
    "Inspect",
    "ConfigurationError",
    "Problem",
    "compare",
    "with_running_values",
    "Changes",
    "named_files",
    "lost_secrets",
    "config_file",
    "Files",
    "effective_toml",
    "SettingKey",
    "settings_keys",
    "named_keys",
    "key_at",
    "example_toml",
    "take_flags",
    "likely_flags",
]
