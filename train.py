"""Trains one run a job: `python train.py -m method=sft,rft,dft,rift,grpo,dpo`. See `--help`."""

from losslens.cli.app import run
from losslens.core.jobs import Tasks


def load() -> Tasks:
    """What this script does."""
    from losslens.pipeline.sweep import Sweep

    sweep = Sweep()
    return sweep.job, sweep.end


if __name__ == "__main__":
    run(__file__, load)
