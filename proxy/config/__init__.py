"""Every setting of the proxy, from flags, environment and file to one frozen `Settings`."""

from proxy.config.keys import SettingKey, example_toml, settings_keys
from proxy.config.loading import load_settings
from proxy.config.problems import ConfigurationError, Problem
from proxy.config.settings import (
    AdminSettings,
    CredentialsSettings,
    ListenSettings,
    LogSettings,
    Settings,
    ShutdownSettings,
    SslMode,
    UpstreamSettings,
    WorkspaceSettings,
    is_loopback,
)

__all__ = [
    "Settings",
    "ListenSettings",
    "AdminSettings",
    "WorkspaceSettings",
    "CredentialsSettings",
    "UpstreamSettings",
    "ShutdownSettings",
    "LogSettings",
    "SslMode",
    "load_settings",
    "ConfigurationError",
    "Problem",
    "SettingKey",
    "settings_keys",
    "example_toml",
    "is_loopback",
]
