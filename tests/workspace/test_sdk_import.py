"""How much of databricks-sdk is imported: what is used, and no name of it is lost by that.

Each in a process of its own: what a process has imported it keeps.
"""

import subprocess
import sys

import pytest

_LOAD = "from proxy.workspace.sdk_import import load\nload()\nimport sys\n"


def output(program: str) -> str:
    """Run it and return what it prints."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def test_no_service_is_imported_that_is_not_called() -> None:
    program = _LOAD + (
        "print(*sorted(name for name in sys.modules if name.startswith('databricks.sdk.service.')))"
    )
    services = {name.rpartition(".")[2] for name in output(program).split()}
    assert {"database", "postgres"} <= services
    assert len(services) < 10  # the SDK has some sixty


@pytest.mark.parametrize(
    "statement",
    [
        "from databricks.sdk import AccountClient",
        "import databricks.sdk; databricks.sdk.AccountClient",
        "from databricks.sdk import azure, oauth",
        "from databricks.sdk.service.jobs import JobsAPI",
    ],
)
def test_whatever_else_the_sdk_defines_is_still_found(statement: str) -> None:
    assert output(_LOAD + statement + "\nprint('found')").endswith("found\n")


def test_a_name_that_the_sdk_does_not_define_is_not_found() -> None:
    program = _LOAD + "import databricks.sdk\nprint(hasattr(databricks.sdk, 'no_such_name'))"
    assert output(program) == "False\n"


def test_an_sdk_that_was_imported_whole_is_left_as_it_is() -> None:
    program = "import databricks.sdk\nbefore = databricks.sdk\n" + _LOAD
    program += "print(sys.modules['databricks.sdk'] is before, type(before).__name__)"
    assert output(program) == "True module\n"
