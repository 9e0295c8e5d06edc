"""What a login sees in its workspace, as text for a person who must name an endpoint.

For: `init`, which asks level by level, and `check` where no endpoint is set. Not for: the calls
(`workspace.listing`).
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from proxy import __version__
from proxy.config import ConfigurationError, Settings, load_settings
from proxy.errors import ProxyError
from proxy.observe.logs import configure_logging
from proxy.verbs.stderr import show_progress
from proxy.workspace.client import Workspace
from proxy.workspace.listing import Listed

# A screen of them. One line more says that there are others.
SHOWN_MAX: Final = 20
_KEY: Final = "upstream.endpoint"
_LEVEL: Final = 3  # the slashes in the name of a branch, which has endpoints


def one_of(found: Sequence[Listed], *, complete: bool = True) -> str:
    """Return the first names, a line each, to follow a sentence."""
    names = [f"\n  {one.name}" for one in found[:SHOWN_MAX]]
    more = len(found) - len(names)
    count = f"{more} more" if complete else "more"
    return "; there is" + "".join(names) + (f"\n  and {count}" if more else "")


def refusal(error: ProxyError) -> str:
    """Return why the workspace was not asked, or what it answered, and what to do."""
    answer = error.response()
    first = f"{answer.message} ({error.reason})"
    return "\n  ".join(line for line in (first, error.detail, answer.text(b"H")) if line)


def with_endpoints(error: ConfigurationError, flags: Sequence[str]) -> ConfigurationError:
    """Return the error; if it is that no endpoint is set, with those that there are.

    Raises ConfigurationError if what is set is wrong.
    """
    if all(problem.key != _KEY for problem in error.problems):
        return error
    settings = load_settings(flags, os.environ)
    configure_logging(**settings.log.model_copy(update={"level": "error"}).model_dump())
    show_progress("asking the workspace for its endpoints")
    there = asyncio.run(_endpoints(settings)).replace("\n", "\n  ")
    return ConfigurationError(
        [
            replace(problem, text=problem.text + there) if problem.key == _KEY else problem
            for problem in error.problems
        ]
    )


async def _endpoints(settings: Settings) -> str:
    """Return the endpoints, or why they cannot be listed, within `mint_timeout_seconds`."""
    target, seconds = settings.upstream, settings.credentials.mint_timeout_seconds
    workspace = Workspace(
        settings.workspace_of(target),
        settings.credentials,
        version=__version__,
        discover=not target.workspace,
        retries=False,
    )
    found: list[Listed] = []
    why = ""
    try:
        async with asyncio.timeout(seconds):
            await _collect(workspace, found)
    except ProxyError as error:
        why = refusal(error)
    except TimeoutError:
        why = f"no answer within {seconds:g} seconds"
    listed = one_of(found, complete=False) if found else ""
    if why:
        return f"{listed}\n  The {'others' if found else 'endpoints'} could not be listed: {why}"
    return listed or "; this login sees no endpoint"


async def _collect(workspace: Workspace, found: list[Listed]) -> None:
    """Add one endpoint more than are shown, at most. Raises ProxyError."""
    parents = [""]
    while parents and len(found) <= SHOWN_MAX:
        parent = parents.pop()
        inside = await workspace.list_inside(parent)
        if parent.count("/") == _LEVEL:
            found += inside
        else:
            parents += [one.name for one in reversed(inside)]
