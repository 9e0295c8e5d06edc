"""Where the drivers of other languages are, as the distribution's packages install them."""

from pathlib import Path
from typing import Final

JDBC: Final = Path("/usr/share/java/postgresql.jar")

_GO_PATH: Final = Path("/usr/share/gocode")
_GO_POSTGRES: Final = _GO_PATH / "src" / "github.com" / "lib" / "pq"
# lib/pq panics where this is set, and tests set it to keep libpq away from a person's own files.
GO_RUN: Final = ("env", "-u", "PGSERVICEFILE", "go", "run")
GO_IS_THERE: Final = ("sh", "-c", f"command -v go && test -d {_GO_POSTGRES}")
# The packages' sources as they lie there: nothing is asked of any network.
GO_ENVIRONMENT: Final = {"GOPATH": str(_GO_PATH), "GO111MODULE": "off"}
