"""The compiled relay, for tests of it."""

from proxy import native
from tests.support.tools import lack


def need_compiled(what: str) -> None:
    """Skip the test that asks unless the relay was compiled; `what` is then not tested."""
    lack(what, [f"the relay was not compiled ({native.WHY_MISSING})"] if native.WHY_MISSING else [])
