"""The SCRAM server, tested with the library that the proxy uses as a client."""

import pytest
from scramp import ScramClient

from proxy.emulator.scram import MECHANISM, ScramRefused, ScramServer

PASSWORD = "not-a-real-password"


def test_the_right_password_and_each_side_proves_itself() -> None:
    client = ScramClient([MECHANISM], "app_native", PASSWORD)
    server = ScramServer(PASSWORD)
    client.set_server_first(server.first(client.get_client_first()))
    client.set_server_final(server.final(client.get_client_final()))


def test_a_wrong_password_is_refused() -> None:
    client = ScramClient([MECHANISM], "app_native", "another")
    server = ScramServer(PASSWORD)
    client.set_server_first(server.first(client.get_client_first()))
    with pytest.raises(ScramRefused, match="wrong proof"):
        server.final(client.get_client_final())


def test_another_exchanges_nonce_is_refused() -> None:
    server = ScramServer(PASSWORD)
    server.first("n,,n=,r=abc")
    with pytest.raises(ScramRefused, match="nonce"):
        server.final("c=biws,r=abcdef,p=AAAA")


@pytest.mark.parametrize(
    "message", ["", "eyJhbGciOiJIUzI1NiJ9.e30.x", "p=tls-unique,,n=,r=a", "n,,"]
)
def test_what_is_not_scram_is_refused(message: str) -> None:
    with pytest.raises(ScramRefused, match="client-first"):
        ScramServer(PASSWORD).first(message)
