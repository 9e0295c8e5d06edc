"""`init`: find an endpoint in the workspace, print a configuration for it and the SQL for the role.

It asks on standard error, and only the result is on standard output: `init > .env` works. Where
there is one project, branch or endpoint, it is taken. Without a terminal flags choose.
"""

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from proxy import __version__
from proxy.config import Settings, load_settings
from proxy.config.toml import toml_value
from proxy.errors import ProxyError
from proxy.exit_codes import EXIT_OK
from proxy.observe.logs import configure_logging
from proxy.verbs.endpoint_list import one_of, refusal
from proxy.verbs.role_sql import role_statements
from proxy.verbs.stderr import fail, show_progress
from proxy.verbs.syntax import Arguments, UsageError
from proxy.verbs.verb_table import BRANCH, PROJECT, ROLE, SQL, TOML
from proxy.workspace.client import Workspace
from proxy.workspace.listing import COLLECTIONS, Listed
from proxy.workspace.resources import resource_of

# Then the person is not there, or cannot mean it.
ANSWERS_MAX: Final = 5


class NotChosen(Exception):
    """There is nothing to choose from, or nothing was chosen. The text says why."""


def run(arguments: Arguments) -> int:
    """Choose, and print. Raises ConfigurationError and UsageError."""
    if arguments.has(SQL) and arguments.has(TOML):
        raise UsageError("--sql prints no configuration: leave --toml out")
    if not (arguments.get(ROLE.name) or "").isprintable():
        raise UsageError("--role is a name of printable characters")
    settings = load_settings(arguments.flags, os.environ)
    if resource_of(settings.upstream) and any(map(arguments.get, (PROJECT.name, BRANCH.name))):
        raise UsageError("an endpoint is set: leave --project and --branch out")
    configure_logging(**settings.log.model_copy(update={"level": "error"}).model_dump())
    workspace = Workspace(
        settings.workspace, settings.credentials, version=__version__, retries=False
    )
    try:
        with asyncio.Runner() as runner:
            show_progress("logging in to the workspace")
            role = arguments.get(ROLE.name) or runner.run(workspace.identity()).role
            found = _found(runner, workspace, settings, arguments)
    except ProxyError as error:
        return fail(refusal(error))
    except NotChosen as error:
        return fail(str(error))
    print(_result(settings, arguments, role, found), end="")
    return EXIT_OK


def _found(
    runner: asyncio.Runner, workspace: Workspace, settings: Settings, arguments: Arguments
) -> dict[str, str]:
    """Return the key that names the endpoint or instance. Raises ProxyError and NotChosen."""
    if named := resource_of(settings.upstream):
        runner.run(workspace.status(named))  # which refuses one that is not there
        return {"endpoint" if settings.upstream.endpoint else "instance": named.name}
    name = ""
    for collection, option in zip(COLLECTIONS, (PROJECT, BRANCH, None), strict=True):
        given = arguments.get(option.name) if option else None
        found = runner.run(workspace.list_inside(name))
        if given is not None:
            inside = f"{name}/{collection}/".lstrip("/")
            wanted = inside + given.removeprefix(inside)  # the list shows the whole name
            if wanted not in [one.name for one in found]:
                raise NotChosen(f"there is no {wanted}{one_of(found)}")
            name = wanted
        else:
            name = _choose(found, collection, name, option.flag if option else "")
    return {"endpoint": name}


def _choose(found: Sequence[Listed], collection: str, parent: str, flag: str) -> str:
    """Return the name that a person chooses, or the only one. Raises NotChosen."""
    if not found:
        where = f"{parent} has" if parent else "this login sees"
        hint = "" if parent else "; a Provisioned instance is named by --upstream.instance"
        raise NotChosen(f"{where} no {collection}{hint}")
    if len(found) == 1:
        _say(f"{found[0].name} {_in_brackets(found[0])}".rstrip())
        return found[0].name
    if sys.stdin is None or not sys.stdin.isatty():
        how = flag or "--upstream.endpoint"
        raise NotChosen(f"there are {len(found)} {collection}: set {how}{one_of(found)}")
    for number, one in enumerate(found, 1):
        _say(f"{number:>3}  {one.name} {_in_brackets(one)}".rstrip())
    for _ in range(ANSWERS_MAX):
        print(f"Which of the {collection}? [1] ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        answer = line.strip() or "1"
        if not line:
            _say("")
            break
        if answer.isascii() and answer.isdigit() and 1 <= int(answer[:9]) <= len(found):
            return found[int(answer[:9]) - 1].name
        _say(f"a number from 1 to {len(found)}, please")
    raise NotChosen("nothing was chosen")


def _in_brackets(listed: Listed) -> str:
    return f"({listed.facts})" if listed.facts else ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- the result ----------------------------------------------------------------------------------


def _result(settings: Settings, arguments: Arguments, role: str, found: Mapping[str, str]) -> str:
    """Return what is printed: the SQL alone, or a configuration with the SQL as its comment."""
    statements = role_statements(role, settings.upstream.database)
    if arguments.has(SQL):
        return "\n".join(statements) + "\n"
    upstream = {**found, "database": settings.upstream.database}
    login = _login(settings, os.environ)
    is_toml = arguments.has(TOML)
    lines = _toml(login, upstream) if is_toml else _environment(login, upstream)
    comment = [
        "",
        "The role and its grants, for the owner of the database to run on this branch:",
        *statements,
    ]
    return "\n".join([*lines, *(f"# {line}".rstrip() for line in comment)]) + "\n"


def _login(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what names the workspace, and no secret. A host is stronger than a profile's own."""
    given = {"profile": settings.workspace.profile, "host": settings.workspace.host}
    if not given["host"]:
        given["host"] = environ.get("DATABRICKS_HOST", "")
        given["profile"] = given["profile"] or environ.get("DATABRICKS_CONFIG_PROFILE", "")
    return {key: value for key, value in given.items() if value}


def _environment(login: Mapping[str, str], upstream: Mapping[str, str]) -> list[str]:
    sections = {"WORKSPACE": login, "UPSTREAM": upstream}
    return [
        f"LAKEBASE_PROXY_{section}__{key.upper()}={value}"
        for section, values in sections.items()
        for key, value in values.items()
    ]


def _toml(login: Mapping[str, str], upstream: Mapping[str, str]) -> list[str]:
    sections = {"workspace": login, "upstream": upstream}
    lines = []
    for section, values in sections.items():
        if values:
            lines += [f"[{section}]", *(f"{key} = {toml_value(values[key])}" for key in values)]
    return lines
