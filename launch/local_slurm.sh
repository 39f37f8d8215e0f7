#!/usr/bin/env bash
# A Slurm of one node, from Debian's packages: launch/local_slurm.sh up|down|status [DIR].
exec bash "$(dirname "$0")/../src/losslens/scheduling/slurm/local_slurm.sh" "$@"
