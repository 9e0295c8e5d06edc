"""What `shards` prints: tables, JSON, refusals, large answers, and progress."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from uuid import uuid4

import pytest

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.cli import main
from proxy.exit_codes import EXIT_FAILURE, EXIT_OK, EXIT_PENDING
from proxy.verbs.shards import VERBS
from proxy.verbs.shards.output import PROGRESS_SECONDS, Output, Progress, described, table
from tests.support.fake_clock import FakeClock
from tests.support.running import Unread, eventually


def test_a_table_is_aligned_and_has_its_header_without_rows() -> None:
    assert table(("name", "n"), [("long name", 1), ("x", 22)]) == [
        "name       n",
        "long name  1",
        "x          22",
    ]
    assert table(("name", "n"), []) == ["name  n"]


def test_facts_without_a_value_have_no_line() -> None:
    assert described({"key_type": "int4", "op": None, "hash": "", "n": 0}) == [
        "key type  int4",
        "n         0",
    ]


@pytest.mark.parametrize("as_json", [True, False])
def test_a_refusal_says_what_why_and_what_to_do(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    error = CatalogueError(Reason.OVERLAP, "the keys are taken", "look with show")
    assert Output(as_json=as_json).refuse(error) == EXIT_FAILURE
    printed = capsys.readouterr()
    if as_json:
        assert json.loads(printed.out) == {
            "ok": False,
            "sqlstate": "23P01",
            "reason": "overlap",
            "error": "the keys are taken",
            "hint": "look with show",
        }
    else:
        assert printed.out == ""
        assert "the keys are taken (SQLSTATE 23P01, reason=overlap)" in printed.err
        assert "look with show" in printed.err


def test_an_operation_that_is_left_pending_has_an_exit_code_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    op_id = uuid4()
    error = CatalogueError(Reason.STEP_FAILED, f"{op_id} is pending", op_id=op_id)
    assert Output(as_json=True).refuse(error) == EXIT_PENDING
    assert str(op_id) in capsys.readouterr().out


@pytest.mark.parametrize("count", [0, 1, 3])
def test_many_rows_are_one_object(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=True)
    rows = [{"low": str(n), "locked": n == 1} for n in range(count)]
    with output.many({"map": {"name": "m"}}, "mappings", ["not printed"]) as added:
        for row in rows:
            added.add([row])
    assert json.loads(capsys.readouterr().out) == {
        "ok": True,
        "map": {"name": "m"},
        "mappings": rows,
    }


def test_many_rows_are_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    with Output(as_json=False).many({}, "mappings", ["a line", ""]) as added:
        added.add([{"low": "10", "locked": True, "op": None}])
        added.add([])
        added.add([{"low": "5", "locked": False, "op": "x"}])
    assert capsys.readouterr().out.splitlines() == [
        "a line",
        "",
        "low  locked  op",
        "10   yes",
        "5    no      x",
    ]


def test_rows_of_an_answer_that_fails_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=True)

    def fail() -> None:
        with output.many({}, "mappings", []) as added:
            added.add([{"low": "1"}])
            raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        fail()
    assert capsys.readouterr().out == ""


async def test_progress_is_said_of_what_takes_long_and_of_nothing_else() -> None:
    clock, err = FakeClock(), io.StringIO()
    with redirect_stderr(err):
        progress = Progress(clock)
        progress("asking the catalogue")
        clock.move(PROGRESS_SECONDS - 0.001)
        progress("asking shard one")  # its timer has a millisecond left
        assert err.getvalue() == ""
        clock.move(0.001)
        await eventually(err.getvalue, "progress")
        assert err.getvalue() == "asking shard one (2 s)\n"
        clock.move(PROGRESS_SECONDS - 0.1)
        progress("asking shard two")
        clock.move(0.1)
        progress("asking shard three")
        assert err.getvalue() == "asking shard one (2 s)\nasking shard three (4 s)\n"
        progress.stop()


async def test_no_reader_of_standard_error_ends_no_operation() -> None:
    """A broken pipe ended a move in the middle, with its mapping offline."""
    clock, output = FakeClock(), Output(as_json=False)
    with redirect_stderr(Unread()):
        progress = Progress(clock)
        clock.move(PROGRESS_SECONDS)
        progress("copying")
        progress.stop()
        output.warn("one session is not registered")
        error = CatalogueError(Reason.STEP_FAILED, "left pending", "resume it", op_id=uuid4())
        assert output.refuse(error) == EXIT_PENDING


def test_help_lists_every_verb() -> None:
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["shards", "--help"]) == EXIT_OK
    for word, verb in VERBS.items():
        assert verb.syntax.usage.startswith(f"shards {word}")
        assert f"\n  {word} " in out.getvalue().replace(f"\n  {word}\n", f"\n  {word} ")
