"""``python -m percov2`` is ``percov2``."""

import sys

from percov2.cli import main

if __name__ == "__main__":
    sys.exit(main())
