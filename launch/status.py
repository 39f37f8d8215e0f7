"""Shows where the runs of a sweep stand, here and on Slurm: `python launch/status.py sweep=NAME [--watch]`."""

import sys

from losslens.cli.status import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
