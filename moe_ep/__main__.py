"""``python -m moe_ep``: the same command line as ``moe-ep``."""

import sys

from moe_ep.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
