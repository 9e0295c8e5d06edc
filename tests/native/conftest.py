"""Every test here is of what was compiled: without it they are skipped, and say so."""

from pathlib import Path

import pytest

from tests.support.compiled import need_compiled
from tests.transport.peers import Contexts, contexts


@pytest.fixture(autouse=True)
def compiled() -> None:
    need_compiled("the compiled relay")


@pytest.fixture(scope="session")
def key_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the secrets of the server's handshakes are."""
    return tmp_path_factory.mktemp("keys") / "log"


@pytest.fixture(scope="session")
def tls(key_log: Path) -> Contexts:
    """Return contexts of which the client's is the compiled one. The server sends no tickets."""
    need_compiled("the compiled TLS")
    made = contexts(compiled=True)
    made.server.num_tickets = 0
    made.server.keylog_filename = str(key_log)
    return made
