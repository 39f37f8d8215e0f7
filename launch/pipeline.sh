#!/usr/bin/env bash
# Rollouts, runs and analysis on Slurm in one command; each waits for what it reads.
#
#   launch/pipeline.sh method=sft,rft,dft,rift,grpo,dpo resources.partition=gpu
#   launch/pipeline.sh experiment=lr_matched_dpo analyze.resources=cpu analyze.checkpoint=norm
#
# Takes what `train.py -m` takes. resources…=, hydra.launcher…= and output_dir= are for the analysis too;
# analyze.KEY=VALUE is for it alone. Again with the same line: submits the runs that are missing, and an analysis.
set -euo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-python}
train=() analyze=() where=()
for argument in "$@"; do
    case $argument in
        -h | --help) sed -n '2,/^set/{/^#/!d;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        analyze.*) analyze+=("${argument#analyze.}") ;;
        resources* | hydra.launcher*) train+=("$argument"); analyze=("$argument" ${analyze[@]+"${analyze[@]}"}) ;;
        experiment=* | sweep=* | output_dir=*) train+=("$argument"); where+=("$argument") ;;
        *) train+=("$argument") ;;
    esac
done
# An experiment may name the sweep.
sweep=$("$python" train.py ${where[@]+"${where[@]}"} --cfg job --package sweep)
output_dir=$("$python" train.py ${where[@]+"${where[@]}"} --cfg job --package output_dir)

# With status 1 a run has diverged before or, with hydra.launcher.wait, has failed: the others are analysed all the same.
status=0
"$python" train.py -m hydra/launcher=slurm ${train[@]+"${train[@]}"} || status=$?
[ $status -le 1 ] || exit $status
case " $* " in *" hydra.launcher.dry_run=true "*) echo "An analysis would follow."; exit $status ;; esac
"$python" analyze.py hydra/launcher=slurm "sweep=$sweep" "output_dir=$output_dir" ${analyze[@]+"${analyze[@]}"}
exit $status
