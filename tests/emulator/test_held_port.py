"""The emulator's ports: refused while held, under one number, and no other program's."""

import socket

import pytest

from proxy.emulator.held_port import LOOPBACK, HeldPort


def test_a_held_port_refuses_keeps_its_number_and_can_be_listened_on_again() -> None:
    port = HeldPort()
    port.hold()
    number = port.number
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOOPBACK, number))
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((LOOPBACK, number))
        listener = port.take()
        assert listener is not None
        assert port.take() is None
        with listener:
            listener.listen()
            socket.create_connection((LOOPBACK, number)).close()
        port.hold()
        assert port.number == number
    port.close()
    with socket.create_server((LOOPBACK, number)):
        port.close()
