"""The command line of the benchmark."""

import pytest

from bench.options import SHARD_MAPS, SOAK, SUBJECTS, parse


def test_without_flags_all_but_the_shard_maps_is_measured() -> None:
    options, outputs = parse([])
    assert options.subjects == set(SUBJECTS) - {SHARD_MAPS}
    assert len(options.loads) == 9
    assert options.rounds == 5
    assert not outputs.publish
    assert not options.floor


def test_full_is_larger_in_every_way() -> None:
    default, full = parse([])[0], parse(["--full"])[0]
    assert full.subjects == set(SUBJECTS)
    assert full.megabytes == 1024
    assert full.scripted_sessions == (1000, 5000)
    assert full.floor
    assert full.connects > default.connects
    assert full.loads[0].seconds > default.loads[0].seconds


def test_a_flag_overrides_full() -> None:
    options, _ = parse(["--full", "--megabytes", "8", "--only", "soak", "--soak", "60"])
    assert (options.megabytes, options.soak_minutes) == (8, 60)
    assert options.subjects == {SOAK}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "everything"],
        ["--rounds", "0"],
        ["--soak", "0"],
        ["--megabytes", "0"],
        ["--publish", "--only", "soak"],
        ["--base", "/nonexistent"],
    ],
)
def test_invalid_options_are_an_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(arguments)
    assert "--" in capsys.readouterr().err
