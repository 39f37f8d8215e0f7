"""Trains one run a job: `python train.py -m method=sft,rft,dft,rift,grpo,dpo`. See `--help`."""

from losslens.cli import run

if __name__ == "__main__":
    from losslens.sweep import Sweep

    sweep = Sweep()
    run(__file__, sweep.job, sweep.end)
