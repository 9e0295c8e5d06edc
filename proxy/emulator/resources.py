"""What the workspace API shows of endpoints, instances, roles and databases, as JSON.

Roles and databases are read from the server when they are asked for, so those that SQL has made are
shown, too. Not emulated: the ids that Lakebase gives them, which are not documented. Here an id is
the name in lower case, with `-` for what an id cannot have.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

from proxy.emulator.endpoints import Endpoint

Json = dict[str, Any]

# What a branch has: these collections, and the resources below them.
BRANCH_COLLECTIONS: Final = ("endpoints", "roles", "databases")

_CLIENT_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ROLES: Final = "SELECT rolname FROM pg_roles WHERE rolcanlogin AND NOT rolsuper ORDER BY oid"
_DATABASES: Final = """SELECT datname || e'\\t' || pg_get_userbyid(datdba) FROM pg_database
    WHERE NOT datistemplate AND datname <> 'postgres' ORDER BY oid"""


def endpoint_json(endpoint: Endpoint) -> Json:
    """Return an Autoscaling endpoint."""
    shown = dict(endpoint.hosts)
    for kind in endpoint.hidden_hosts:
        shown.pop(kind, None)
    status = {
        "endpoint_type": endpoint.kind,
        "current_state": endpoint.state,
        "disabled": endpoint.disabled,
        "hosts": shown,
    }
    return {"name": endpoint.name, "uid": endpoint.uid, "status": status}


def instance_json(instance: Endpoint) -> Json:
    """Return a Provisioned instance."""
    dns = {
        "read_write_dns": instance.hosts["host"],
        "read_only_dns": instance.hosts["read_only_host"],
    }
    shown = {"host": "read_write_dns", "read_only_host": "read_only_dns"}
    for kind in instance.hidden_hosts:
        dns.pop(shown[kind], None)
    return {"name": instance.name, "uid": instance.uid, "state": instance.state, **dns}


def branch_resources(endpoint: Endpoint, collection: str) -> Iterator[Json]:
    """Yield what an endpoint's branch has in a collection. Roles and databases block."""
    branch = endpoint.name.rpartition("/endpoints/")[0]
    if collection == "roles":
        for role in endpoint.cluster.execute(_ROLES).splitlines():
            yield _role_json(branch, role, _identity_type(endpoint, role))
    elif collection == "databases":
        for row in endpoint.cluster.execute(_DATABASES).splitlines():
            yield _database_json(branch, *row.split("\t", 1))
    else:
        yield endpoint_json(endpoint)


def instance_roles(instance: Endpoint) -> list[Json]:
    """Return the roles of a Provisioned instance; blocks."""
    roles = instance.cluster.execute(_ROLES).splitlines()
    kinds = {role: _identity_type(instance, role) or "PG_ONLY" for role in roles}
    return [{"name": role, "identity_type": kind} for role, kind in kinds.items()]


def _role_json(branch: str, role: str, kind: str) -> Json:
    status = {"postgres_role": role, "role_id": _id(role)}
    if kind:
        status |= {"identity_type": kind, "auth_method": "LAKEBASE_OAUTH_V1"}
    else:
        status |= {"auth_method": "PG_PASSWORD_SCRAM_SHA_256"}
    return {"name": f"{branch}/roles/{_id(role)}", "parent": branch, "status": status}


def _database_json(branch: str, database: str, owner: str) -> Json:
    status = {"postgres_database": database, "role": f"{branch}/roles/{_id(owner)}"}
    return {"name": f"{branch}/databases/{_id(database)}", "parent": branch, "status": status}


def _identity_type(endpoint: Endpoint, role: str) -> str:
    """Return the kind of identity that may log in as a role; empty for a native one."""
    if _CLIENT_ID.fullmatch(role):
        return "SERVICE_PRINCIPAL"
    if role in endpoint.members:
        return "GROUP"
    return "USER" if "@" in role else ""


def _id(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
