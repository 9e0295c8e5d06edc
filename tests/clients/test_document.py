"""docs/clients.md is what the last runs recorded of the clients and checks that the tests have."""

from tests.clients.document import DOCUMENT, NOT_RUN, document


def test_the_document_is_current() -> None:
    assert DOCUMENT.read_text() == document(), "run `make clients`"


def test_every_client_and_check_of_the_tests_was_run() -> None:
    assert NOT_RUN not in document(), "run `make clients`"
