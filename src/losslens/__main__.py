"""`python -m losslens COMMAND …`, for torchrun and where the console script is not on the path."""

import sys

from losslens.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
