"""``python -m gpumove`` is the command line."""

import sys

from gpumove.cli import main

if __name__ == "__main__":
    sys.exit(main())
