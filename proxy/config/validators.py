"""Checks of single values, which the sections of the model share.

For: hosts, names, paths, templates. Not for: what one key requires of another.

Invariant: an error says what the value must be, and never shows it: it may be a misplaced secret.
"""

import re
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

from proxy.addresses import address_of, is_loopback
from proxy.routing.key_sources import DatabasePattern

BLANKS: Final = " \t\r\n\v\f\ufeff"  # the last one is the byte order mark
QUOTES: Final = ('"', "'", "`")
# The workspace's id, which the address bar of a browser shows.
_WORKSPACE_QUERY: Final = re.compile(r"(o=\d*)?")
# RFC 1123, with the underscore that private DNS zones use. 253 is the longest DNS name.
_HOST_NAME = re.compile(r"(?=.{1,253}$)\w([\w.-]*[\w.])?", re.ASCII)
_ENDPOINT = re.compile(r"projects/[^/\s]+/branches/[^/\s]+/endpoints/[^/\s]+")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}")
# PostgreSQL truncates longer database names.
_ALIAS_BYTES_MAX = 63
# No dot, because the prefix "lakebase." is reserved.
_PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
# Parameters that have another meaning in a StartupMessage.
_PARAMETERS_RESERVED = ("user", "database", "options", "replication")


def check_host(value: str) -> str:
    if address_of(value) is None and not _HOST_NAME.fullmatch(value):
        raise ValueError("must be a host name or an address, without scheme, port or path")
    return value


def workspace_address(value: str) -> str:
    """Return the address of a workspace as scheme and host, without what is harmless.

    Raises ValueError for what is not the address of a workspace alone.
    """
    text = value.strip(BLANKS)
    if text[:1] in QUOTES or text[-1:] in QUOTES:
        raise ValueError("the value is in quotes; remove them")
    try:
        parts = urlsplit(text if "://" in text else f"https://{text}")
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("the workspace's address is no URL") from None
    if parts.scheme not in ("https", "http"):
        raise ValueError("the workspace's address must begin with https://")
    if parts.path.strip("/"):
        raise ValueError("the workspace's address has a path; give https://HOST alone")
    if not _WORKSPACE_QUERY.fullmatch(parts.query) or parts.fragment:
        raise ValueError("the workspace's address has a query; give https://HOST alone")
    if "@" in parts.netloc:
        raise ValueError("the workspace's address must not contain a user or a password")
    try:
        check_host(host or "")
    except ValueError:
        raise ValueError("the workspace's address has no valid host name") from None
    return f"{parts.scheme}://{parts.netloc}"


def check_workspace_host(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ValueError(
            "must be https:// unless the host is this machine: otherwise the client secret can be"
            " read in transit"
        )
    workspace_address(value)
    return value


def check_address(value: str) -> str:
    if address_of(value) is None:
        raise ValueError("must be an IPv4 or IPv6 address")
    return value


def check_endpoint(value: str) -> str:
    if not _ENDPOINT.fullmatch(value):
        raise ValueError(
            "must have the form projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT"
            " (with the endpoint's id, such as primary, not its uid ep-...)"
        )
    return value


def check_directory(value: str) -> str:
    # sockaddr_un has 107 bytes on Linux, and the name of the socket itself has up to 14.
    if not value.startswith("/") or len(value.encode()) > 92:
        raise ValueError("must be an absolute path of at most 92 bytes")
    return check_no_nul(value)


def check_mode(value: str) -> str:
    if not re.fullmatch(r"0?[0-7]{3}", value):
        raise ValueError("must be three octal digits, such as 0600 or 0660")
    return value


def check_no_nul(value: str) -> str:
    # NUL ends a string in the StartupMessage, and the rest would become parameters. In a file name
    # it causes a ValueError in place of an OSError where the file is opened.
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value


def check_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("must be a name of 1 to 63 letters, digits, underscores and hyphens")
    return value


def check_alias(value: str) -> str:
    if not value or "\0" in value or len(value.encode()) > _ALIAS_BYTES_MAX:
        raise ValueError(f"must be a name of 1 to {_ALIAS_BYTES_MAX} bytes without NUL")
    return value


def check_parameter(value: str) -> str:
    if not _PARAMETER.fullmatch(value) or value.lower() in _PARAMETERS_RESERVED:
        raise ValueError(
            "must be a name of 1 to 63 letters, digits and underscores, other than "
            + ", ".join(_PARAMETERS_RESERVED)
        )
    return value


def check_database_pattern(value: str) -> str:
    DatabasePattern.parse(value)
    return value


def join_list(value: object) -> object:
    """Return a list of hosts as one text, as it is written in a variable or a flag."""
    if isinstance(value, list | tuple) and all(isinstance(host, str) for host in value):
        return ",".join(value)
    return value


class Marker(Enum):
    """What the metadata of a field says about its key, besides type and bounds."""

    NEEDS_RESTART = "Needs a restart."
    WATCHED_FILE = "Names a file. A reload reads it again if its contents have changed."


FileName = Annotated[str, AfterValidator(check_no_nul)]
WatchedFileName = Annotated[FileName, Marker.WATCHED_FILE]


def or_empty(check: Callable[[str], str]) -> AfterValidator:
    """Return a validator that applies `check` unless the value is empty, which means not set."""
    return AfterValidator(lambda value: value and check(value))


class Section(BaseModel):
    """The base of every section: frozen, and without unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_switch_for_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true and false where another type is required: pydantic takes true for 1."""
        name = info.field_name or ""
        if isinstance(value, bool) and cls.model_fields[name].annotation is not bool:
            raise ValueError("must not be true or false")
        return value
