"""Every test here is of what was compiled: without it they are skipped, and say so."""


import pytest

from tests.support.compiled import need_compiled
from tests.transport.peers import Contexts, contexts


@pytest.fixture(autouse=True)
def compiled() -> None:
    need_compiled("the compiled relay")


@pytest.fixture(scope="session")
def tls() -> Contexts:
    """Return contexts of which the client's is the compiled one."""
    need_compiled("the compiled TLS")
    return _without_tickets(contexts(compiled=True))


@pytest.fixture(scope="session")
def python_tls(tls: Contexts) -> Contexts:
    """Return the same with Python's TLS for the client."""
    return Contexts(tls.server, tls.client, tls.authority)


def _without_tickets(made: Contexts) -> Contexts:
    """Leave the numbers of the server's records to the tests that write some themselves."""
    made.server.num_tickets = 0
    return made
