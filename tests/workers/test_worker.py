"""A worker's part of what bounds the whole proxy."""

from proxy.config import Settings
from proxy.workers.worker import shared_out

ENDPOINT = "projects/a/branches/b/endpoints/c"


def test_connects_max_is_shared_out_and_rounded_up_wherever_it_is_set() -> None:
    settings = Settings.model_validate(
        {
            "listen": {"workers": 4},
            "upstream": {"endpoint": ENDPOINT},
            "targets": {"own": {"host": "h", "connects_max": 5}, "taken": {"host": "h"}},
        }
    )
    assert settings.target("taken").connects_max == 50
    mine = shared_out(settings)
    found = {name: mine.target(name).connects_max for name in mine.target_names()}
    assert found == {"upstream": 13, "own": 2, "taken": 13}
    assert mine.target("own").host == "h"
