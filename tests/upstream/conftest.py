"""The fixtures that the tests of upstream/ and workspace/ share."""

from tests.support.emulated_workspace import (
    api,
    authority,
    ca_file,
    context,
    endpoint,
    no_databricks_environment,
)

__all__ = ["api", "authority", "ca_file", "context", "endpoint", "no_databricks_environment"]
