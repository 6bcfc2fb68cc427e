"""`python -m fastsd`: the same as the console script `fastsd`."""

import sys

from fastsd.cli import main

if __name__ == "__main__":
    sys.exit(main())
