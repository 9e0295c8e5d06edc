"""Each verb as a new user tries it, with wrong input of every kind, in 80 columns."""

import pytest

from proxy.verbs import shards
from proxy.verbs.help import help_of, overview
from proxy.verbs.syntax import Syntax
from proxy.verbs.verb_table import VERBS
from tests.transcripts import FILE, rerun

SYNTAXES = [*VERBS.values(), *(verb.syntax for verb in shards.VERBS.values())]


def test_every_command_answers_as_it_is_written() -> None:
    written = FILE.read_text()
    assert rerun(written) == written, "run `make docs`, and look at what has changed"


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.usage.split("[")[0])
def test_every_help_fits_80_columns_and_explains_each_flag(
    syntax: Syntax, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = help_of(syntax)
    assert syntax.summary
    assert [line for line in (shown + overview(VERBS)).splitlines() if len(line) > 80] == []
    for option in syntax.options:
        assert option.help
        assert f"\n  {option.flag} " in shown
        assert option.flag in syntax.usage or syntax.usage.startswith("shards ")
