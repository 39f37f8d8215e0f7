"""Takes runs of an earlier LossLens over: `python launch/migrate.py output_dir=outputs`. Nothing is trained again."""

import sys

from losslens.cli.migrate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
