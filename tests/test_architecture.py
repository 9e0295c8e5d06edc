"""The house's rules that a machine can check: floors, sans-IO, sizes, names, who makes tasks.

The floors themselves are import-linter's contracts in pyproject.toml; the rest reads the syntax
tree, so that a rule is broken by what is written and not by what happens to be imported.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "proxy").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

FUNCTION_LINES_MAX = 70

WIRE_IMPORTS = {"__future__", "collections", "dataclasses", "enum", "struct", "typing"}
# Pure computation: unsigned arrays and CSV lines for large maps, normal forms of Unicode for keys.
ROUTING_IMPORTS = WIRE_IMPORTS | {
    *("array", "bisect", "csv", "datetime", "hashlib", "unicodedata", "uuid"),
}

# Words that say nothing about what is inside.
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base"} | {
    *("manager", "managers", "handler", "handlers", "data", "info", "context"),
}

# Where a task is made outside a TaskGroup, and what makes sure that it cannot be lost.
TASK_MAKERS = {
    "proxy/session/drain.py": "leaving the listener's block of accepting waits for them all",
    "proxy/session/private_listener.py": "leaving the blocks of it and of connect waits for them",
    "proxy/server/catalogue_maps.py": "a reload exchanges them; its context stops them",
    "proxy/catalogue/copy_command.py": "it is waited for; an interruption ends its process",
    "proxy/pool/spares.py": "the pool cancels them when it closes, and waits for them",
    "proxy/workspace/single_flight.py": "its owner closes it, which waits for the call",
    "proxy/observe/admin.py": "leaving the block of serve_admin waits for it",
    "proxy/observe/history.py": "leaving the block of sampling waits for it",
    "proxy/workers/rpc.py": "an answer ends with its connection, which its process ends with",
    "proxy/workers/supervisor.py": "leaving the block of accepting waits for them all",
    "proxy/emulator/connection.py": "a connection of the emulator waits for its own tasks",
    "proxy/emulator/session.py": "a connection of the emulator waits for its own tasks",
}

# The loop's own pool has a few threads, which everybody shares: one name that DNS does not answer
# stalled every target. `proxy/blocking.py` has threads for each purpose.
POOL_USERS = ("proxy/emulator/cluster.py",)  # starts and stops PostgreSQL, and is not in `run`

# Waits of these tests are for another process, where there is no event to wait for. `simulation`
# runs in virtual time. In `session` and `upstream` a call that takes a moment is tested, in
# `differential` what is sent at any moment, and in `pool` and `soak` at random moments.
SLEEPERS = (
    "tests/clients/",
    "tests/differential/test_activity_at_random.py",
    "tests/e2e/",
    "tests/emulator/",
    "tests/pool/test_pool.py",
    "tests/simulation/",
    "tests/soak/",
    "tests/support/",
    "tests/session/test_relay.py",
    "tests/test_blocking.py",
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the module of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides the floor it goes to"
            assert node.module is not None
            yield node.module


def foreign_to_wire(tree: ast.Module) -> set[str]:
    return {
        module
        for module in imports(tree)
        if module.partition(".")[0] not in WIRE_IMPORTS
        and module != "proxy.wire"
        and not module.startswith("proxy.wire.")
    }


def foreign_to_routing(tree: ast.Module) -> set[str]:
    own = ("proxy.routing", "proxy.errors", "proxy.wire")
    return {
        module
        for module in imports(tree)
        if module.partition(".")[0] not in ROUTING_IMPORTS
        and not any(module == name or module.startswith(f"{name}.") for name in own)
    }


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines from `def` to its end, without its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def long_functions(tree: ast.Module) -> list[str]:
    return [
        f"{node.name} ({lines_of(node)} lines)"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and lines_of(node) > FUNCTION_LINES_MAX
    ]


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call by the name it is written with, as in `asyncio.sleep`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def lone_tasks(tree: ast.Module) -> list[str]:
    """Return the calls that make a task which no TaskGroup waits for."""
    return [
        name
        for name, _call in calls(tree)
        if name in {"create_task", "ensure_future", "asyncio.ensure_future"}
        or (name.endswith(".create_task") and ("loop" in name or name.startswith("asyncio.")))
    ]


def pool_calls(tree: ast.Module) -> list[str]:
    """Return the calls that run in the event loop's own pool of threads."""
    ending = ("run_in_executor", "to_thread", "loop.getaddrinfo", "get_running_loop().getaddrinfo")
    return [name for name, _call in calls(tree) if name.endswith(ending)]


def sleeps(tree: ast.Module) -> list[str]:
    """Return the calls that sleep; `asyncio.sleep(0)` only lets others run."""
    return [
        ast.unparse(call)
        for name, call in calls(tree)
        if name == "time.sleep"
        or (name == "asyncio.sleep" and ast.unparse(call) != "asyncio.sleep(0)")
    ]


def broken(
    files: list[Path], find: Callable[[ast.Module], list[str]], allowed: tuple[str, ...] = ()
) -> dict[str, list[str]]:
    """Return what `find` finds, by file, in the files that are not allowed to have it."""
    found = {relative(path): find(tree_of(path)) for path in files}
    return {path: where for path, where in found.items() if where and not path.startswith(allowed)}


def test_the_floors_are_kept() -> None:
    # In a process of its own: import-linter disables the loggers of the one it runs in.
    code = "import importlinter.cli as cli, sys; sys.exit(cli.lint_imports(no_cache=True))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_wire_imports_nothing_that_could_do_io_or_tell_the_time() -> None:
    wire = [path for path in PACKAGE if relative(path).startswith("proxy/wire/")]
    assert wire, "the rule has lost its subject"
    assert broken(wire, lambda tree: sorted(foreign_to_wire(tree))) == {}


def test_routing_imports_nothing_that_could_do_io_or_tell_the_time() -> None:
    routing = [path for path in PACKAGE if relative(path).startswith("proxy/routing/")]
    assert routing, "the rule has lost its subject"
    assert broken(routing, lambda tree: sorted(foreign_to_routing(tree))) == {}


def test_the_package_itself_imports_nothing() -> None:
    assert list(imports(tree_of(ROOT / "proxy" / "__init__.py"))) == []


def test_no_function_is_longer_than_a_screen() -> None:
    assert broken(PACKAGE + TESTS, long_functions) == {}


def test_every_module_says_what_it_is_for() -> None:
    silent = [relative(path) for path in PACKAGE + TESTS if not ast.get_docstring(tree_of(path))]
    assert silent == []


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [relative(path) for path in PACKAGE + TESTS if path.stem in EMPTY_NAMES] == []


def test_tasks_belong_to_a_group_or_are_on_the_list() -> None:
    makers = broken(PACKAGE, lone_tasks)
    assert makers.keys() <= TASK_MAKERS.keys(), makers
    assert makers.keys() == TASK_MAKERS.keys(), "the list names a file that makes none any more"


def test_nothing_runs_in_the_loops_own_pool_of_threads() -> None:
    assert broken(PACKAGE, pool_calls, allowed=POOL_USERS) == {}


def test_no_unit_test_sleeps() -> None:
    assert broken(TESTS, sleeps, allowed=SLEEPERS) == {}


# The rules themselves: each finds what it is there to find.


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import time", {"time"}),
        ("def f():\n    import socket", {"socket"}),
        ("from asyncio import sleep", {"asyncio"}),
        ("from proxy.errors import ProxyError", {"proxy.errors"}),
        ("import proxy.wireless", {"proxy.wireless"}),
        ("from collections.abc import Buffer\nfrom proxy.wire import secret\nimport enum", set()),
    ],
)
def test_a_foreign_import_of_wire_is_seen(source: str, found: set[str]) -> None:
    assert foreign_to_wire(ast.parse(source)) == found


@pytest.mark.parametrize(("statements", "long"), [(69, False), (70, True)])
def test_a_functions_docstring_does_not_count(statements: int, long: bool) -> None:
    body = "    x = 1\n" * statements
    documented = f'async def f():\n    """Say.\n\n    More.\n    """\n{body}'
    for source in (f"def f():\n{body}", documented):
        assert bool(long_functions(ast.parse(source))) == long


@pytest.mark.parametrize(
    ("source", "lone"),
    [
        ("asyncio.create_task(f())", True),
        ("asyncio.get_running_loop().create_task(f())", True),
        ("self._loop.create_task(f())", True),
        ("asyncio.ensure_future(f())", True),
        ("create_task(f())", True),
        ("tasks.create_task(f())", False),
    ],
)
def test_a_task_without_a_group_is_seen(source: str, lone: bool) -> None:
    assert bool(lone_tasks(ast.parse(source))) == lone


@pytest.mark.parametrize(
    ("source", "sleeping"),
    [
        ("time.sleep(1)", True),
        ("await asyncio.sleep(0.01)", True),
        ("await asyncio.sleep(0)", False),
    ],
)
def test_a_sleep_is_seen(source: str, sleeping: bool) -> None:
    assert bool(sleeps(ast.parse(source))) == sleeping
