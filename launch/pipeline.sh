#!/usr/bin/env bash
# Rollouts, runs and analysis on Slurm in one command; each waits for what it reads (--help).
#
#   launch/pipeline.sh method=sft,rft,dft,rift,grpo,dpo resources.partition=gpu
#   launch/pipeline.sh experiment=lr_matched_dpo analyze.resources=cpu analyze.checkpoint=norm
cd "$(dirname "$0")/.." && exec "${PYTHON:-python}" -m losslens.cli.pipeline "$@"
