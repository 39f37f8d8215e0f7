"""Makes the dashboard of a sweep on W&B, a workspace and a report: `python launch/wandb_dashboard.py sweep=NAME`."""

import sys

from losslens.cli.dashboard import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
