"""Writing TOML: the standard library's reader returns what was written."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.toml import split_path, toml_key, toml_path, toml_value

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.one_of(
    TEXT, st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    PLAIN, lambda inside: st.lists(inside) | st.dictionaries(TEXT, inside), max_leaves=10
)


@given(VALUES)
def test_a_value_is_read_as_it_was_written(value: object) -> None:
    assert tomllib.loads(f"key = {toml_value(value)}") == {"key": value}


@given(TEXT)
def test_a_key_is_read_as_it_was_written(part: str) -> None:
    assert tomllib.loads(f"{toml_key(part)} = 1") == {part: 1}


@given(st.lists(TEXT.filter(bool), min_size=1))
def test_a_path_is_split_where_it_was_joined(path: list[str]) -> None:
    assert split_path(toml_path(path)) == tuple(path)


@pytest.mark.parametrize(
    ("dotted", "path"),
    [
        ("listen.port", ("listen", "port")),
        ("listen..port", ("listen", "", "port")),
        ('databases."my.db"', ("databases", "my.db")),
        ('databases."my.db".target', ("databases", "my.db", "target")),
        ("", ("",)),
    ],
)
def test_an_unquoted_path_is_split_at_its_dots(dotted: str, path: tuple[str, ...]) -> None:
    assert split_path(dotted) == path


@pytest.mark.parametrize("text", ['"', 'a"b', '"a', 'a."', '"\\u12"', '"\\x"', '""'])
def test_any_text_can_be_split(text: str) -> None:
    assert isinstance(split_path(text), tuple)


def test_a_type_that_toml_does_not_have_is_refused() -> None:
    with pytest.raises(TypeError, match="TOML has no NoneType"):
        toml_value(None)
