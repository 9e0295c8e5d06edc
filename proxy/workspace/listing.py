"""The projects, branches and endpoints of a workspace, for a person who chooses one.

The calls block: `client` makes them in a thread. The SDK reads page after page; how many names are
read, and for how long, is bounded.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from proxy.workspace.sdk_import import WorkspaceClient

# More than a person reads. A workspace has 1,000 projects at most, and a project 500 branches.
LISTED_MAX: Final = 1000

COLLECTIONS: Final = ("projects", "branches", "endpoints")


@dataclass(frozen=True, slots=True)
class Listed:
    """A project, a branch or an endpoint. `facts` is what the list says of an endpoint."""

    name: str
    facts: str = ""


def list_inside(client: WorkspaceClient, parent: str) -> list[Listed]:
    """Return the first LISTED_MAX projects, or what a project or a branch has.

    `parent` is empty, or a resource's name. Raises what the SDK raises.
    """
    services: dict[int, Callable[[], Iterable[Any]]] = {
        0: client.postgres.list_projects,
        1: lambda: client.postgres.list_branches(parent),
        3: lambda: client.postgres.list_endpoints(parent),
    }
    found = islice(services[parent.count("/")](), LISTED_MAX)
    names = ((str(one.name or ""), one) for one in found)
    return [Listed(name, _facts(one)) for name, one in names if name and name.isprintable()]


def _facts(found: Any) -> str:
    status = getattr(found, "status", None)
    kind, state = getattr(status, "endpoint_type", None), getattr(status, "current_state", None)
    if kind is None or state is None:
        return ""
    word = str(kind.value).removeprefix("ENDPOINT_TYPE_").lower().replace("_", "-")
    disabled = ", disabled" if getattr(status, "disabled", False) else ""
    return f"{word}, {state.value}{disabled}"
