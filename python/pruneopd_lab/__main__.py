"""`python -m pruneopd_lab` is the command `pruneopd`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
