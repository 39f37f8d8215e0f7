"""Sends the offline W&B runs of a sweep: `python launch/wandb_sync.py sweep=NAME [parallel=N]`."""

import sys

from losslens.cli.sync import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
