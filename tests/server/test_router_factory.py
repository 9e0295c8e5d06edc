"""From settings to a router: what is built, and how often. What maps mean: `tests/routing`."""

import asyncio
import gc
import os
from pathlib import Path

import pytest

from proxy.config import ConfigurationError, Settings
from proxy.server import router_factory
from proxy.server.metric_labels import build_metrics
from proxy.server.router_factory import map_problems, reread_with_router, rewritten_file, router_of
from proxy.server.snapshot import ConfigSnapshot
from proxy.workspace.registry import LocalWorkspaceRegistry

ENDPOINT = "projects/p/branches/b/endpoints/e"

# Read in about a second; measured, nothing waited for more than 0.03 of it, where it was 0.1 before
# sorting was done in parts. The bound is for machines that are busy.
ROWS = 200_000
GAP_SECONDS_MAX = 0.25


def settings(directory: Path, *names: str, used: str) -> Settings:
    """Return settings with a map from a file of its own for each name."""
    maps = {}
    for name in names:
        file = directory / f"{name}.csv"
        if not file.exists():
            file.write_text(f"key,target\n{name},upstream\n")
        maps[name] = {"kind": "list", "key_type": "text", "mappings_file": str(file)}
    values = {
        "upstream": {"endpoint": ENDPOINT},
        "routing": {"shard_map": used},
        "shard_maps": maps,
    }
    return Settings.model_validate(values)


@pytest.mark.parametrize("used", ["a", "b", "c", "d"])
def test_checking_all_maps_and_using_one_builds_each_once(tmp_path: Path, used: str) -> None:
    # A million mappings take seconds, and the router is made while sessions wait.
    router_factory._build_map.cache_clear()
    configured = settings(tmp_path, "a", "b", "c", "d", used=used)
    assert list(map_problems(configured)) == []
    assert router_of(configured).shard_map is not None
    assert router_factory._build_map.cache_info().misses == 4


def test_a_file_that_is_as_it_was_is_read_once(tmp_path: Path) -> None:
    router_factory._build_map.cache_clear()
    first = router_of(settings(tmp_path, "a", used="a")).shard_map
    assert router_of(settings(tmp_path, "a", used="a")).shard_map is first


def test_a_file_that_was_rewritten_is_told_by_what_it_maps(tmp_path: Path) -> None:
    configured = settings(tmp_path, "a", used="a")
    first = router_of(configured).shard_map
    file = tmp_path / "a.csv"
    file.write_text("target,key\nupstream,a\n")  # the same in other words
    second = router_of(configured).shard_map
    assert second is not first
    assert rewritten_file(configured, first, second) is None
    file.write_text("key,target\nb,upstream\n")
    third = router_of(configured).shard_map
    assert rewritten_file(configured, second, third) == "shard_maps.a.mappings_file"
    assert rewritten_file(configured, None, third) is None


def test_a_file_that_cannot_be_used_is_a_problem_under_its_key(tmp_path: Path) -> None:
    configured = settings(tmp_path, "a", "b", "c", used="a")
    (tmp_path / "a.csv").write_bytes(b"key,target\n\xff,upstream\n")
    (tmp_path / "b.csv").unlink()
    (tmp_path / "c.csv").write_text("key,target\nx,nowhere\n")
    texts = {problem.key: problem.text for problem in map_problems(configured)}
    assert "not UTF-8" in texts["shard_maps.a.mappings_file"]
    assert "No such file" in texts["shard_maps.b.mappings_file"]
    assert "nowhere" in texts["shard_maps.c.mappings_file"]
    with pytest.raises(ConfigurationError) as caught:
        router_of(configured)
    assert [problem.key for problem in caught.value.problems] == ["shard_maps.a.mappings_file"]


def test_what_is_not_a_regular_file_is_not_opened(tmp_path: Path) -> None:
    # A reload waited until a pipe was written to, and the process could not be ended.
    os.mkfifo(tmp_path / "a.csv")
    (problem,) = map_problems(settings(tmp_path, "a", used="a"))
    assert "shard_maps.a.mappings_file" in str(problem)
    assert "it is not a regular file" in str(problem)


def test_a_file_without_any_row_is_no_map(tmp_path: Path) -> None:
    """A file that lost its rows must not unmap every tenant at the next reload."""
    configured = settings(tmp_path, "a", used="a")
    for text in ("key,target\n", "target,key\n\n\n"):
        (tmp_path / "a.csv").write_text(text)
        (problem,) = map_problems(configured)
        assert str(problem) == "shard_maps.a.mappings_file: it has no mapping"


async def test_sessions_go_on_while_a_large_map_is_read(tmp_path: Path) -> None:
    """Whatever holds the interpreter's lock for long stops every session: sorting, for one."""
    configured = settings(tmp_path, "a", used="a")
    rows = (f"{number * 7919 % ROWS},upstream\n" for number in range(ROWS))  # in no order
    (tmp_path / "a.csv").write_text("key,target\n" + "".join(rows))
    gaps: list[float] = []

    loop = asyncio.get_running_loop()

    def tick(due: float) -> None:
        gaps.append(loop.time() - due)
        due = loop.time() + 0.001
        loop.call_at(due, tick, due)

    tick(loop.time())  # ends with the loop
    settings_read, router = await asyncio.to_thread(reread_with_router, lambda: configured)
    assert settings_read is configured
    assert router.shard_map is not None
    assert len(router.shard_map) == ROWS
    assert gc.isenabled()
    assert max(gaps) < GAP_SECONDS_MAX


def test_a_reload_is_refused_when_the_file_of_a_secret_is_gone(tmp_path: Path) -> None:
    """It said that it had reloaded."""
    gone = {"client_secret_file": str(tmp_path / "gone")}
    given = {"upstream": {"endpoint": ENDPOINT}, "workspace": gone}
    configured = Settings.model_validate(given)
    with pytest.raises(ConfigurationError, match="client_secret_file: no such file"):
        reread_with_router(lambda: configured)


def test_a_snapshot_uses_the_router_that_was_made(tmp_path: Path) -> None:
    """It is not made twice, and not by a file that changed in between."""
    configured = settings(tmp_path, "a", used="a")
    router = router_of(configured)
    (tmp_path / "a.csv").unlink()
    workspaces = LocalWorkspaceRegistry(build_metrics(), version="test")
    snapshot = ConfigSnapshot(
        configured, workspaces, lambda target, phase, seconds: None, router=router
    )
    assert snapshot.router is router
