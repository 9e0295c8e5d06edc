"""A Secret gives its bytes to `reveal` and to nothing else."""

import copy
import pickle
from dataclasses import dataclass

import pytest

from proxy.wire.messages import BackendKeyData, PasswordMessage
from proxy.wire.secret import MASK, Secret
from proxy.wire.startup import CancelRequest

CONTENT = b"not-a-real-secret"
SECRET = Secret(CONTENT)


@dataclass(frozen=True, slots=True)
class Holder:
    inner: Secret


SHOWN = {
    "repr": repr(SECRET),
    "str": str(SECRET),
    "f-string": f"{SECRET}",
    "f-string with a width": f"{SECRET:>40}",
    "f-string with repr": f"{SECRET!r}",
    "format method": "{0} {0!r} {0!s}".format(SECRET),  # noqa: UP032 - one of the forms
    "percent": "%s %r" % (SECRET, SECRET),  # noqa: UP031 - logging formats so
    "in a tuple": repr((SECRET, [SECRET], {"key": SECRET})),
    "in a dataclass": repr(Holder(SECRET)),
    "in an exception": repr(ValueError(SECRET)) + str(ValueError(SECRET)),
    "in a CancelRequest": repr(CancelRequest(1, SECRET)),
    "in a BackendKeyData": repr(BackendKeyData(1, SECRET)),
    "in a PasswordMessage": repr(PasswordMessage(SECRET)),
}


@pytest.mark.parametrize("form", SHOWN)
def test_a_secret_shows_only_that_it_is_there(form: str) -> None:
    assert CONTENT.decode() not in SHOWN[form]
    assert MASK in SHOWN[form]


def test_reveal_gives_the_bytes() -> None:
    assert Secret(b"\x00\xff").reveal() == b"\x00\xff"


def test_secrets_compare_by_value_and_only_with_secrets() -> None:
    assert Secret(CONTENT) == SECRET
    assert Secret(b"other") != SECRET
    assert SECRET != CONTENT
    assert CONTENT != SECRET


def test_a_secret_is_a_key_of_a_look_up() -> None:
    assert {SECRET: 1}[Secret(CONTENT)] == 1


def test_the_length_is_no_secret() -> None:
    assert len(SECRET) == len(CONTENT)


def test_a_secret_is_neither_pickled_nor_copied() -> None:
    for refused in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never pickled"):
            refused(SECRET)


def test_a_secret_has_no_dict_to_dump() -> None:
    assert not hasattr(SECRET, "__dict__")


def test_a_secret_does_not_turn_into_bytes_by_itself() -> None:
    for conversion in ("bytes(secret)", "b'' + secret", "list(secret)"):
        with pytest.raises(TypeError):
            eval(conversion, {"secret": SECRET})
