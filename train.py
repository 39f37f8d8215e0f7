"""Trains one run a job: `python train.py -m method=sft,rft,dft,rift,grpo,dpo`. See `--help`."""

from losslens.cli.train import load, main

__all__ = ["load"]  # which a job on Slurm asks this file for

if __name__ == "__main__":
    main(__file__)
