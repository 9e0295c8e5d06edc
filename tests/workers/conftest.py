"""The workspace without clusters, as the tests of upstream/ and workspace/ have it."""

from tests.support.emulated_workspace import api, endpoint, no_databricks_environment

__all__ = ["api", "endpoint", "no_databricks_environment"]
