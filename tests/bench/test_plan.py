"""The command line of the benchmark."""

import pytest

from bench.plan import SHARD_MAPS, SOAK, SUBJECTS, read


def test_without_flags_all_but_the_shard_maps_is_measured() -> None:
    plan, outputs = read([])
    assert plan.subjects == set(SUBJECTS) - {SHARD_MAPS}
    assert len(plan.loads) == 9
    assert plan.rounds == 5
    assert not outputs.publish
    assert not plan.floor


def test_full_is_larger_in_every_way() -> None:
    plan, full = read([])[0], read(["--full"])[0]
    assert full.subjects == set(SUBJECTS)
    assert full.megabytes == 1024
    assert full.scripted_sessions == (1000, 5000)
    assert full.floor
    assert full.connects > plan.connects
    assert full.loads[0].seconds > plan.loads[0].seconds


def test_a_flag_overrules_full() -> None:
    plan, _ = read(["--full", "--megabytes", "8", "--only", "soak", "--soak", "60"])
    assert (plan.megabytes, plan.soak_minutes) == (8, 60)
    assert plan.subjects == {SOAK}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "everything"],
        ["--rounds", "0"],
        ["--soak", "0"],
        ["--megabytes", "0"],
        ["--publish", "--only", "soak"],
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        read(arguments)
    assert "--" in capsys.readouterr().err
