"""`python -m proxy` is `lakebase-auth-proxy`."""

import sys

from proxy.cli import main

if __name__ == "__main__":
    sys.exit(main())
