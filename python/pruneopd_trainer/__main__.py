"""`python -m pruneopd_trainer` is the command `pruneopd`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
