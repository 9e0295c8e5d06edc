"""The calls of the workspace API, without HTTP: the parts of a request in, a reply out.

It has identities, tokens, endpoints and instances, and refuses exactly the requests that the real
API is known to refuse. Listening, faults and waiting are in `workspace`.
"""

import base64
import binascii
import datetime
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final
from urllib.parse import parse_qs

from proxy.emulator.endpoints import Dialect, Endpoint
from proxy.emulator.faults import (
    INSTANCE_NOT_FOUND,
    INVALID_CLIENT,
    NOT_FOUND,
    UNAUTHENTICATED,
    Reply,
    api_error,
)
from proxy.emulator.resources import (
    BRANCH_COLLECTIONS,
    Json,
    branch_resources,
    instance_json,
    instance_roles,
)
from proxy.emulator.tokens import Purpose, TokenIssuer, TokenRefused, fingerprint

# The lifetimes that may be requested for a database credential; the longer one is the default.
TTL_SECONDS_MIN: Final = 300
TTL_SECONDS_MAX: Final = 3600
PAGE_SIZE_MAX: Final = 100

# Of every identity, as Me shows it.
DISPLAY_NAME: Final = "Lakebase demo"

# The collections that a resource name goes through.
_COLLECTIONS: Final = (("projects",), ("branches",), BRANCH_COLLECTIONS)
_ENDPOINT_NAME: Final = re.compile(r"projects/[^/]+/branches/[^/]+/endpoints/[^/]+")


class Call(Enum):
    """The calls that the SDK makes, by method and path. Faults and counts refer to them."""

    DISCOVERY = re.compile(r"GET /\.well-known/databricks-config")
    OIDC = re.compile(r"GET /oidc/\.well-known/oauth-authorization-server")
    TOKEN = re.compile(r"POST /oidc/v1/token")
    CREDENTIAL = re.compile(r"POST /api/2\.0/postgres/credentials")
    RESOURCE = re.compile(r"GET /api/2\.0/postgres/(projects(?:/.+)?)")
    INSTANCE_CREDENTIAL = re.compile(r"POST /api/2\.0/database/credentials")
    INSTANCES = re.compile(r"GET /api/2\.0/database/instances")
    INSTANCE = re.compile(r"GET /api/2\.0/database/instances(?:/([^/]+)|:findByUid)")
    INSTANCE_ROLES = re.compile(r"GET /api/2\.0/database/instances/([^/]+)/roles")
    ME = re.compile(r"GET /api/2\.0/preview/scim/v2/Me")


class ExpiryFormat(Enum):
    """The format of a credential's expiry."""

    UTC = auto()
    FRACTION = auto()
    OFFSET = auto()


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """One HTTP request; header names are lower-case, `base` is the server's own URL."""

    call: Call
    name: str  # the part of the path that names a resource, or ""
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    base: str


@dataclass(frozen=True, slots=True)
class Mint:
    """One database credential that was issued."""

    identity: str
    name: str  # the endpoint or the instance it was requested for
    lifetime_seconds: float
    fingerprint: str


class Api:
    """One workspace: its identities, endpoints and instances, and the credentials it minted."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        clients: Mapping[str, str],
        clock: Callable[[], float],
    ) -> None:
        """`clients` maps client ids to secrets; `clock` returns seconds since the epoch."""
        self.endpoints = list(endpoints)
        self.clients = dict(clients)
        self.personal_tokens: dict[str, str] = {}  # PAT -> identity
        self.pats_may_mint = True  # not known of the real credential API
        self.workspace_id = str(secrets.randbelow(10**15) + 10**15)
        self.issuer = TokenIssuer(self.workspace_id, clock)
        self.workspace_token_seconds: float = TTL_SECONDS_MAX
        self.credential_seconds: float = TTL_SECONDS_MAX  # negative: expired when issued
        self.expiry_format = ExpiryFormat.UTC
        self.page_size_max = PAGE_SIZE_MAX
        self.mints: list[Mint] = []
        self.workspace_id_headers: set[str] = set()  # received in X-Databricks-Workspace-Id
        self._clock = clock

    def answer(self, request: ApiRequest) -> Reply:
        """Return the reply that the request has without a fault."""
        match request.call:
            case Call.DISCOVERY:
                return self._discovery(request.base)
            case Call.OIDC:
                oidc = f"{request.base}/oidc/v1"
                return _ok(
                    {"authorization_endpoint": f"{oidc}/authorize"}
                    | {"token_endpoint": f"{oidc}/token"}
                )
            case Call.TOKEN:
                return self._token(request)
            case _:
                return self._answer_bearer(request)

    def _answer_bearer(self, request: ApiRequest) -> Reply:
        identity = self._bearer_identity(request)
        if identity is None:
            return UNAUTHENTICATED
        self.workspace_id_headers.add(request.headers.get("x-databricks-workspace-id", ""))
        match request.call:
            case Call.CREDENTIAL:
                return self._credential(identity, request)
            case Call.RESOURCE:
                return self._resource(request)
            case Call.INSTANCE_CREDENTIAL:
                return self._instance_credential(identity, request)
            case Call.INSTANCES:
                return self._page("database_instances", self._instances(), request.query)
            case Call.INSTANCE:
                return self._instance(request)
            case Call.INSTANCE_ROLES:
                return self._instance_roles(request)
            case _:
                me = {"userName": identity, "displayName": DISPLAY_NAME, "active": True}
                return _ok({"id": "1", **me})

    # -- logins ---------------------------------------------------------------------------------

    def _discovery(self, base: str) -> Reply:
        return _ok(
            {
                "oidc_endpoint": f"{base}/oidc",
                "account_id": "0b5e55ed-0000-4000-8000-000000000001",
                "workspace_id": self.workspace_id,
                "cloud": "AWS",
            }
        )

    def _token(self, request: ApiRequest) -> Reply:
        form = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
        match form.get("grant_type"):
            case "client_credentials":
                client = self._basic_client(request)
            case "urn:ietf:params:oauth:grant-type:token-exchange":
                client = self._federated_client(form)
            case _:
                return Reply(400, b'{"error":"unsupported_grant_type"}')
        if client is None:
            return INVALID_CLIENT
        seconds = self.workspace_token_seconds
        token = self.issuer.issue(client, Purpose.WORKSPACE, seconds)
        return _ok({"access_token": token, "token_type": "Bearer", "expires_in": seconds})

    def _basic_client(self, request: ApiRequest) -> str | None:
        """Return the client id of a Basic login, None if it is wrong."""
        kind, _, encoded = request.headers.get("authorization", "").partition(" ")
        try:
            client, _, secret = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        right = kind == "Basic" and self.clients.get(client) == secret
        return client if right else None

    def _federated_client(self, form: Mapping[str, str]) -> str | None:
        """Return the client id of a federation token, None if it is invalid."""
        try:
            claims = self.issuer.inspect(form.get("subject_token", ""), Purpose.FEDERATION)
        except TokenRefused:
            return None
        known = claims.identity in self.clients and claims.identity == form.get("client_id")
        return claims.identity if known else None

    def _bearer_identity(self, request: ApiRequest) -> str | None:
        """Return the identity of the request's workspace token or PAT, None if it is invalid."""
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind != "Bearer":
            return None
        if token in self.personal_tokens:
            minting = request.call in (Call.CREDENTIAL, Call.INSTANCE_CREDENTIAL)
            return self.personal_tokens[token] if self.pats_may_mint or not minting else None
        try:
            return self.issuer.inspect(token, Purpose.WORKSPACE).identity
        except TokenRefused:
            return None

    # -- Autoscaling ----------------------------------------------------------------------------

    def _credential(self, identity: str, request: ApiRequest) -> Reply:
        body = _json_object(request.body)
        name = str(body.get("endpoint", ""))
        if not _ENDPOINT_NAME.fullmatch(name):
            return _invalid("endpoint must be projects/P/branches/B/endpoints/E")
        if self._find(name, Dialect.AUTOSCALING) is None:
            return NOT_FOUND
        seconds = self._requested_seconds(body)
        if seconds is None or not TTL_SECONDS_MIN <= seconds <= TTL_SECONDS_MAX:
            return _invalid(f"ttl must be {TTL_SECONDS_MIN}s to {TTL_SECONDS_MAX}s")
        if "ttl" not in body and "expire_time" not in body:
            seconds = self.credential_seconds
        token, expiry = self._mint(identity, name, seconds)
        return _ok({"token": token, "expire_time": expiry})

    def _resource(self, request: ApiRequest) -> Reply:
        """Answer a GET below /postgres/: an even count of segments is a resource, an odd a list."""
        segments = request.name.split("/")
        if len(segments) > 6 or any(
            one not in known for one, known in zip(segments[::2], _COLLECTIONS, strict=False)
        ):
            return NOT_FOUND
        known = self._known((*segments[4:5], "endpoints")[0])
        if len(segments) % 2:
            return self._list(segments, known, request.query)
        if len(segments) < 6 and any(name.startswith(request.name + "/") for name in known):
            return _ok({"name": request.name})
        return _ok(known[request.name]) if request.name in known else NOT_FOUND

    def _known(self, collection: str) -> dict[str, Json]:
        """Return what is in such a collection of every branch, by resource name."""
        endpoints = [one for one in self.endpoints if one.listed_as is Dialect.AUTOSCALING]
        found = (one for endpoint in endpoints for one in branch_resources(endpoint, collection))
        return {one["name"]: one for one in found}

    def _list(
        self, segments: Sequence[str], known: Mapping[str, Json], query: Mapping[str, str]
    ) -> Reply:
        parent, collection = "/".join(segments[:-1]), segments[-1]
        depth = len(segments) + 1
        inside = [name for name in known if name.startswith(f"{parent}/" if parent else "")]
        if not inside:
            return NOT_FOUND
        names = dict.fromkeys("/".join(name.split("/")[:depth]) for name in inside)
        return self._page(collection, [known.get(name, {"name": name}) for name in names], query)

    def _page(self, collection: str, found: Sequence[Json], query: Mapping[str, str]) -> Reply:
        given = query.get("page_token") or "0", query.get("page_size") or "0"
        if not all(number.isdecimal() for number in given):
            return _invalid("page_token and page_size are numbers, and not negative")
        start, size = map(int, given)
        size = min(size or self.page_size_max, self.page_size_max)
        more = start + size < len(found)
        token = str(start + size) if more else ""
        return _ok({collection: found[start : start + size], "next_page_token": token})

    # -- Provisioned ----------------------------------------------------------------------------

    def _instance_credential(self, identity: str, request: ApiRequest) -> Reply:
        names = _json_object(request.body).get("instance_names")
        if not isinstance(names, list) or not names:
            return _invalid("instance_names must name at least one instance")
        if any(self._find(str(name), Dialect.PROVISIONED) is None for name in names):
            return INSTANCE_NOT_FOUND
        token, expiry = self._mint(identity, str(names[0]), self.credential_seconds)
        return _ok({"token": token, "expiration_time": expiry})

    def _instances(self) -> list[Json]:
        found = (one for one in self.endpoints if one.listed_as is Dialect.PROVISIONED)
        return [instance_json(one) for one in found]

    def _instance(self, request: ApiRequest) -> Reply:
        key, value = ("name", request.name) if request.name else ("uid", request.query.get("uid"))
        found = (one for one in self._instances() if one[key] == value)
        instance = next(found, None)
        return INSTANCE_NOT_FOUND if instance is None else _ok(instance)

    def _instance_roles(self, request: ApiRequest) -> Reply:
        instance = self._find(request.name, Dialect.PROVISIONED)
        if instance is None:
            return INSTANCE_NOT_FOUND
        return self._page("database_instance_roles", instance_roles(instance), request.query)

    # -- Autoscaling and Provisioned ------------------------------------------------------------

    def _mint(self, identity: str, name: str, seconds: float) -> tuple[str, str]:
        """Return a new database token and its expiry.

        As with the real API, the token is valid for every database of its identity: `name` is only
        recorded.
        """
        token = self.issuer.issue(identity, Purpose.DATABASE, seconds)
        self.mints.append(Mint(identity, name, seconds, fingerprint(token)))
        expiry = datetime.datetime.fromtimestamp(self._clock() + seconds, datetime.UTC)
        return token, _format_expiry(expiry, self.expiry_format)

    def _requested_seconds(self, body: Mapping[str, object]) -> float | None:
        """Return the requested lifetime, the longest one by default, None if it is invalid."""
        try:
            if "ttl" in body:
                return float(str(body["ttl"]).removesuffix("s"))
            if "expire_time" in body:
                until = datetime.datetime.fromisoformat(str(body["expire_time"]))
                return round(until.timestamp() - self._clock())
        except ValueError:
            return None
        return TTL_SECONDS_MAX

    def _find(self, name: str, dialect: Dialect) -> Endpoint | None:
        return next((e for e in self.endpoints if e.name == name and e.listed_as is dialect), None)


def _format_expiry(moment: datetime.datetime, expiry_format: ExpiryFormat) -> str:
    match expiry_format:
        case ExpiryFormat.UTC:
            return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
        case ExpiryFormat.FRACTION:
            return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        case ExpiryFormat.OFFSET:
            return moment.strftime("%Y-%m-%dT%H:%M:%S+00:00")


def _json_object(body: bytes) -> dict[str, object]:
    try:
        value = json.loads(body or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _invalid(message: str) -> Reply:
    return api_error(400, "INVALID_PARAMETER_VALUE", message)


def _ok(body: Mapping[str, object]) -> Reply:
    return Reply(200, json.dumps(body).encode())
