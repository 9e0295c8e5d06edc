"""What the SDK logs in with: settings, environment and profile, checked before they are used.

The SDK reads environment and profile itself. It reports a mistake there late, as a workspace that
cannot be reached, or as an exception that names neither file nor variable. Here each mistake is a
ProxyError that names it, and nothing is sent.

What is harmless is removed: blanks and newlines around a value, a byte order mark, the slash and
the `?o=` of an address that was copied from a browser.

For: values. Not for: the client that is made of them (`sdk_client`). Invariant: no value is in an
error, because it may be a secret; only the name of its setting, variable or file.
"""

import configparser
import re
import ssl
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote

from pydantic import SecretStr

from proxy.config import WorkspaceSettings
from proxy.config.validators import BLANKS, QUOTES, workspace_address
from proxy.errors import ErrorKind, ProxyError
from proxy.workspace.sdk_http import proxy_variable, usable_proxies

# These are sent in a header, or are part of a URL.
_SENT_NAMES: Final = frozenset(
    (
        *("host", "client_id", "client_secret", "token", "auth_type"),
        *("azure_client_id", "azure_client_secret", "azure_tenant_id"),
        "azure_workspace_resource_id",
    )
)
_PROFILES: Final = "~/.databrickscfg"
# Of env-oidc, if no other is named.
_IDENTITY_VARIABLE: Final = "DATABRICKS_OIDC_TOKEN"
_DEFAULT_PROFILE: Final = "DEFAULT"
_PROFILE_FILE_BYTES_MAX: Final = 1 << 20

_PORT_MAX: Final = 65535
# A backslash ends the host as a slash does; brackets are of an IPv6 address.
_PROXY_URL: Final = re.compile(
    r"(https?://)?([^/?#\\[\]\s]*@)?([\w.-]+|\[[\da-fA-F:.]+\])(:\d+)?/?"
)


class _Given(NamedTuple):
    text: str
    source: str
    """The setting or the variable."""


def mistake(source: str, text: str) -> ProxyError:
    """Return the error for a setting, a variable or a file that cannot be used."""
    return ProxyError(ErrorKind.CONFIGURATION_MISTAKE, f"{source}: {text}")


def sdk_arguments(
    settings: WorkspaceSettings,
    file_secret: str,
    variables: Mapping[str, list[str]],
    environ: Mapping[str, str],
) -> dict[str, str]:
    """Return what is set, by the SDK's own names. Raises ProxyError for what cannot be used.

    `variables` are the variables that the SDK reads for each name; none for an isolated client.
    """
    # The settings have the SDK's own names, except for the file.
    given = {
        name: _Given(_revealed(value), f"workspace.{name}")
        for name, value in settings
        if value and name not in ("client_secret_file", "ssl_root_cert")
    }
    if file_secret:
        given["client_secret"] = _Given(file_secret, "workspace.client_secret_file")
    for name, candidates in variables.items():
        found = [_Given(environ[key], key) for key in candidates if environ.get(key)]
        if found and name not in given:
            given[name] = found[0]
    arguments = {name: clean(name, text, source) for name, (text, source) in given.items()}
    for name in ("oidc_token_env", "oidc_token_filepath", "auth_type"):
        if name in given:
            check_identity_token(arguments, given[name].source, environ)
            break
    return {name: text for name, text in arguments.items() if text}


def check_network(host: str, environ: Mapping[str, str]) -> None:
    """Raise ProxyError if what the environment sets for requests to `host` cannot be used."""
    _check_ca_bundle(host, environ)
    _check_proxy(host, environ)


def clean(name: str, text: str, source: str) -> str:
    """Return a value without what is harmless. Raises ProxyError if it cannot be used."""
    text = text.strip(BLANKS)
    if name not in _SENT_NAMES or not text:
        return text
    if text[0] in QUOTES or text[-1] in QUOTES:
        raise mistake(source, "the value is in quotes; remove them")
    if "\n" in text or "\r" in text:
        raise mistake(source, "the value has more than one line")
    if not (text.isascii() and text.isprintable()):
        raise mistake(source, "the value has a character that cannot be sent in an HTTP header")
    return _address(text, source) if name == "host" else text


def _address(text: str, source: str) -> str:
    """Return the address of a workspace as scheme and host. Raises ProxyError."""
    try:
        return workspace_address(text)
    except ValueError as error:
        raise mistake(source, str(error)) from None


def profile_values(config_file: str, profile: str, known: frozenset[str]) -> dict[str, str]:
    """Return the values of a profile, by the SDK's `known` names; {} if there is no profile.

    An empty `config_file` or `profile` means the SDK's own default. Raises ProxyError.
    """
    path = _profile_path(config_file, profile)
    if path is None:
        return {}
    parser = _parsed(path)
    chosen = profile or parser.get("__settings__", "default_profile", fallback="").strip()
    name = chosen or _DEFAULT_PROFILE
    if not parser.has_section(name):
        if chosen:
            raise mistake(str(path), f"it has no profile [{name}]")
        return {}
    values = {
        key: clean(key, value, f"{path}, {key} of [{name}]")
        for key, value in parser.items(name)
        if key in known
    }
    return {**values, **({"profile": chosen} if chosen else {})}


def _profile_path(config_file: str, profile: str) -> Path | None:
    """Return the file with the profiles, None if there is none and none is needed."""
    try:
        path = Path(config_file or _PROFILES).expanduser()
    except RuntimeError:
        if not (profile or config_file):
            return None
        why = "there is no home directory; set HOME, or an absolute path in DATABRICKS_CONFIG_FILE"
        raise mistake(config_file or _PROFILES, why) from None
    try:
        is_there, is_fifo = path.exists(), path.is_fifo()
    except (OSError, ValueError) as error:
        raise mistake(str(path), getattr(error, "strerror", None) or "it is no path") from None
    if is_fifo:
        raise mistake(str(path), "it is not a regular file")  # opening it might block
    if not is_there:
        if profile:
            raise mistake(str(path), f"the file with the profile [{profile}] does not exist")
        return None
    return path


def _parsed(path: Path) -> configparser.RawConfigParser:
    """Parse a profile file. Raises ProxyError, which shows no line of it."""
    # Without a section whose values all others inherit, as the SDK reads it.
    parser = configparser.RawConfigParser(default_section="")
    try:
        with path.open("rb") as file:
            parser.read_string(file.read(_PROFILE_FILE_BYTES_MAX).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise mistake(str(path), "the file is not UTF-8") from None
    except OSError as error:
        raise mistake(str(path), error.strerror or "it cannot be read") from None
    except configparser.Error as error:
        raise mistake(str(path), _parse_error(error)) from None
    return parser


def _parse_error(error: configparser.Error) -> str:
    match error:
        case configparser.MissingSectionHeaderError(lineno=line):
            return f"line {line} stands before the first [PROFILE]"
        case configparser.DuplicateOptionError(lineno=line, option=key, section=section):
            return f"line {line} sets {key} of [{section}] a second time"
        case configparser.DuplicateSectionError(lineno=line, section=section):
            return f"line {line} begins [{section}] a second time"
        case configparser.ParsingError(errors=[(line, _), *_]):
            return f"line {line} is not NAME = VALUE"
    return "it is no file of profiles"


def check_identity_token(
    values: Mapping[str, str], source: str, environ: Mapping[str, str]
) -> None:
    """Raise ProxyError if file-oidc or env-oidc is to be used and its token cannot be sent.

    `source` is where the token's place is set. The SDK reads it again for each login.
    """
    path = values.get("oidc_token_filepath")
    is_other = any(values.get(name) for name in ("token", "client_secret"))
    auth_type = values.get("auth_type") or ("" if is_other else "env-oidc or file-oidc")
    variable = values.get("oidc_token_env") or ("" if path else _IDENTITY_VARIABLE)
    if variable and "env-oidc" in auth_type:
        token = environ.get(variable, "")
        if not clean("token", token, variable):
            raise mistake(source, f"the variable {variable} is not set")
    elif path and "file-oidc" in auth_type:
        clean("token", _token_file(path, source), f"{source}: {path}")


def _token_file(path: str, source: str) -> str:
    file = Path(path)
    try:
        if file.is_fifo():
            raise mistake(source, f"{path} is not a regular file")  # opening it might block
        with file.open("rb") as opened:
            text = opened.read(_PROFILE_FILE_BYTES_MAX).decode()
    except UnicodeDecodeError:
        raise mistake(source, f"the file {path} is not UTF-8") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it cannot be read"
        raise mistake(source, f"{path}: {why}") from None
    if not text.strip(BLANKS):
        raise mistake(source, f"the file {path} is empty")
    return text


def _check_ca_bundle(host: str, environ: Mapping[str, str]) -> None:
    """Raise ProxyError if the authorities that are to be trusted cannot be read."""
    variables = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # in the order of `requests`
    variable = next((name for name in variables if environ.get(name)), None)
    if variable is None or not host.startswith("https://"):
        return
    _check_authorities(environ[variable], variable)


def check_root_cert(path: str) -> None:
    """Raise ProxyError if the authorities of `ssl_root_cert` cannot be read; it blocks."""
    _check_authorities(path, "workspace.ssl_root_cert")


def _check_authorities(path: str, source: str) -> None:
    if problem := authorities_problem(path):
        raise mistake(source, problem)


def authorities_problem(path: str) -> str:
    """Return why certificate authorities cannot be read from a file, or "" if they can."""
    file = Path(path)
    try:
        if file.is_fifo():
            return f"{path} is not a regular file"  # opening it might block
        # A directory is read when a certificate is verified.
        if not file.is_dir():
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        return f"{path} holds no certificates in PEM"
    except OSError as error:
        return f"{path}: {error.strerror or 'it cannot be read'}"
    return ""


def _check_proxy(host: str, environ: Mapping[str, str]) -> None:
    """Raise ProxyError if the HTTP proxy on the path to the workspace cannot be used."""
    from requests.utils import get_environ_proxies, select_proxy  # noqa: PLC0415 - slow

    url = select_proxy(host, usable_proxies(get_environ_proxies(host, no_proxy=None)))
    if not url:
        return
    variable = proxy_variable(host, url, environ)
    if url.lower().startswith("socks"):
        if find_spec("socks") is None:
            why = "a SOCKS proxy cannot be used; name an HTTP proxy in HTTPS_PROXY"
            raise mistake(variable, why)
        return
    if not _is_proxy_url(url):
        why = "it is no URL like http://USER:PASSWORD@HOST:PORT (write %23 for #, %2F for /)"
        raise mistake(variable, why)


def _is_proxy_url(url: str) -> bool:
    """Return whether an HTTP proxy's URL can be used; the library's error would show parts of it.

    A user and a password are sent in a header.
    """
    match = _PROXY_URL.fullmatch(url)
    if match is None:
        return False
    login, port = unquote(match[2] or ""), match[4] or ":0"
    try:
        login.encode("latin-1")
    except UnicodeEncodeError:
        return False
    return login.isprintable() and int(port[1:]) <= _PORT_MAX


def proxy_secrets(environ: Mapping[str, str]) -> set[str]:
    """Return the users and passwords of HTTP proxies, in every form that a text may show them."""
    secrets: set[str] = set()
    for name, value in environ.items():
        if not name.lower().endswith("_proxy") or name.lower() == "no_proxy":
            continue
        login = value.partition("://")[2].rpartition("@")[0] or value.rpartition("@")[0]
        password = login.partition(":")[2]
        for text in (login, password):
            secrets |= {text, unquote(text)}
        # A text that was cut at one of these has only a part.
        secrets |= {part for part in re.split(r"[/?#@:\\\[\]\s]", password) if len(part) > 2}
    return secrets - {""}


def _revealed(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def read_secret_file(path: str) -> str:
    """Return the content of `client_secret_file`. Raises ProxyError; it blocks."""
    source = "workspace.client_secret_file"
    try:
        text = Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise mistake(source, getattr(error, "strerror", None) or "the file is not UTF-8") from None
    secret = clean("client_secret", text, source)
    if not secret:  # the SDK would look for a secret elsewhere
        raise mistake(source, "the file is empty")
    return secret
