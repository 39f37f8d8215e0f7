#!/usr/bin/env bash
# A Slurm of one node, from Debian's packages, to try a sweep on a laptop or in CI.
# Called by `losslens slurm` and launch/local_slurm.sh.
set -euo pipefail
name=${LOCAL_SLURM_NAME:-launch/local_slurm.sh}

usage() {
  printf 'usage: %s up|down|status [DIR]\n\n' "$name"
  printf '  up      start it (if need be) and print the line to run:  eval "$(%s up)"\n' "$name"
  cat <<'TEXT'
  down    cancel its jobs and stop its daemons; the logs stay
  status  sinfo and squeue; exit status 0 when it is up, 1 when it is not

DIR holds everything, ports and munge key included; folders of their own make instances of their own.
It is the second argument, else $LOCAL_SLURM_DIR, else .local_slurm in the current folder.
Partitions: main (default, 60 s of grace) and urgent, whose jobs preempt and requeue those of main.
Environment, read when the daemons start:
  LOCAL_SLURM_CPUS       CPUs the node claims to have (default: those of the machine)
  LOCAL_SLURM_MAX_ARRAY  MaxArraySize (default: Slurm's, 1001)
TEXT
}

say() { printf '%s: %s\n' "${LOCAL_SLURM_NAME:-local_slurm}" "$*" >&2; }
refuse() { say "$*"; exit 2; }

case "${1:-}" in
  up | down | status) ;;
  -h | --help) usage; exit 0 ;;
  *) usage | head -n 1 >&2; exit 2 ;;
esac
[ $# -le 2 ] || refuse "one folder at most, quoted if need be"
PATH=$PATH:/usr/sbin:/sbin  # where the daemons lie, which ordinary users do not search
verb=$1 dir=${2:-${LOCAL_SLURM_DIR:-.local_slurm}}
# One spelling only: the running daemons are told by it.
dir=$(realpath -m -- "$dir")
# slurm.conf splits its lines at spaces and knows these other characters as its own.
[[ $dir != *[[:space:]\"\'\\,=#%]* ]] || refuse "no spaces, quotes, or any of \\ , = # % in the folder's path: $dir"
node=$(uname -n) node=${node%%.*}
# A step's Unix socket is spool/NODE_JOB.STEP, with up to ten digits each, and Linux stops at 107 characters.
longest=$((107 - ${#node} - 29))
[ ${#dir} -le $longest ] || refuse "the folder's path has ${#dir} characters, Unix sockets allow $longest: $dir"
for number in "${LOCAL_SLURM_CPUS:-1}" "${LOCAL_SLURM_MAX_ARRAY:-1}"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || refuse "LOCAL_SLURM_CPUS and LOCAL_SLURM_MAX_ARRAY take a number from 1 on: $number"
done
# Also for the calls below: a SLURM_CONF already exported may be another instance's.
export SLURM_CONF=$dir/etc/slurm.conf

# pid PROGRAM: its process id, if the pid file names a process that is this program with this folder.
pid() {
  local id
  id=$(cat "$dir/run/$1.pid" 2>/dev/null) && [ -n "$id" ] || return 1
  case " $(tr '\0' ' ' 2>/dev/null <"/proc/$id/cmdline") " in
    *"$1 "*"$dir/etc/"*) echo "$id" ;;
    *) return 1 ;;
  esac
}
is_up() { pid munged && pid slurmctld && pid slurmd; } >/dev/null

# within SECONDS COMMAND...: true as soon as the command is, false after that many seconds.
within() {
  local end=$((SECONDS + $1))
  until "${@:2}"; do [ "$SECONDS" -lt "$end" ] || return 1; sleep 0.2; done
}

free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 12000)) # below the ports Linux gives to outgoing connections
    (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

write_conf() {
  local cpus=${LOCAL_SLURM_CPUS:-$(getconf _NPROCESSORS_ONLN)} memory user
  # A name of its own: job ids begin at 1 again in another folder, and are remembered beside the cluster's name.
  [ -e "$dir/etc/cluster" ] || echo "local$RANDOM$RANDOM" >"$dir/etc/cluster"
  memory=$(awk '/^MemTotal:/ { print int($2 / 1024) }' /proc/meminfo) user=$(id -un)
  cat >"$SLURM_CONF" <<CONF
# Written by LossLens's local_slurm.sh at every start.
ClusterName=$(cat "$dir/etc/cluster")
# With the address, since a laptop's name need not resolve. The daemons listen on all addresses (NoInAddrAny needs
# the name), but obey nobody who lacks the munge key.
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
# Root's daemons run the jobs of all users who may enter the folder; anyone else's run those of their own.
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for cred_expire seconds: 120 by default, and also when told less than 5.
AuthInfo=socket=$dir/run/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
# Nothing that needs cgroups, which containers and ordinary users often lack. So memory is looked at every two
# seconds, and a job killed for it is FAILED with "Exceeded job memory limit" in its log, not OUT_OF_MEMORY.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=10
OverTimeLimit=0
# Ended jobs can be asked about for an hour.
MinJobAge=3600
${LOCAL_SLURM_MAX_ARRAY:+MaxArraySize=$LOCAL_SLURM_MAX_ARRAY}
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# Without it a job that asks for no memory gets all of it, and the node runs one job at a time.
DefMemPerCPU=$((memory / cpus))
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# As grace begins, the steps get the signal asked for with --signal, if any, instead of SIGTERM. A job that ends
# during grace is over; one that outlasts it, or calls scontrol requeue itself, is requeued.
SlurmctldParameters=preempt_send_user_signal
# The node may claim more CPUs than the machine has.
SlurmdParameters=config_overrides
NodeName=$node NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory
PartitionName=main Nodes=$node Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE
PartitionName=urgent Nodes=$node PriorityTier=2 MaxTime=INFINITE
CONF
}

fail() {
  say "$*; the end of the logs in $dir/log:"
  tail -qn 4 "$dir"/log/*.{out,log} >&2 2>/dev/null || true
  exit 1
}
start() {
  pid "$1" >/dev/null && return
  # Output to a file: a daemon holding ours would keep a caller's pipe or command substitution waiting.
  "$@" </dev/null >"$dir/log/$1.out" 2>&1 || fail "$1 did not start"
  within 60 pid "$1" >/dev/null || fail "$1 did not start"
}
# Also while jobs end on it (completing, +) or wait for it (planned, -), but not one that does not answer (*).
node_ready() { sinfo -h -o %T 2>/dev/null | grep -Eq '^(idle|mixed|allocated|completing|planned)[-+]?$'; }

up() {
  local program
  for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || refuse "$program is not installed: apt-get install slurm-wlm munge"
  done
  if ! is_up; then
    mkdir -p "$dir"/{etc,state,spool,log,run}
    [ -e "$dir/etc/munge.key" ] || (umask 077 && dd if=/dev/urandom of="$dir/etc/munge.key" bs=128 count=1 status=none)
    # While one of the two still runs, its ports stay.
    pid slurmctld >/dev/null || pid slurmd >/dev/null || write_conf
    # --force: it would refuse a folder below one that others may enter or write to.
    start munged --force --key-file="$dir/etc/munge.key" --socket="$dir/run/munge.socket" \
      --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed"
    start slurmctld -f "$SLURM_CONF"
    start slurmd -f "$SLURM_CONF"
  fi
  # slurmctld asks a node that it did not reach again after 100 s (a third of SlurmdTimeout).
  within 150 node_ready || fail "the node is not ready after 150 s: $(sinfo -h -o %T 2>&1)"
  say "up, in $dir"
  printf 'export SLURM_CONF=%q\n' "$SLURM_CONF"
}

no_jobs() { [ -z "$(squeue -h -o %A 2>/dev/null)" ]; }
# A zombie, which some containers keep, has no command line either.
gone() { [ -z "$(tr -d '\0' 2>/dev/null <"/proc/$1/cmdline")" ]; }

# The processes of this instance's steps, and their slurmstepd, told by the environment slurmd gives them.
leftovers() {
  grep -lzFx "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ | cut -d/ -f3 | while read -r id; do
    if [ "$(cat "/proc/$id/comm")" = slurmstepd ] || grep -qzFx "SLURMD_NODENAME=$node" "/proc/$id/environ"; then
      echo "$id"
    fi
  done
} 2>/dev/null

down() {
  local program id
  if { pid munged && pid slurmctld; } >/dev/null; then
    squeue -h -o %A | sort -u | xargs -r scancel || true
    # KillWait and a little more, for jobs that do not stop at SIGTERM.
    ! is_up || within 20 no_jobs || say "killing jobs that did not end"
  fi
  # Leftovers after slurmctld, which starts jobs, and before slurmd, which waits for them.
  for program in slurmctld leftovers slurmd munged; do
    [ $program != leftovers ] || { { leftovers || true; } | xargs -r kill -KILL 2>/dev/null || true; }
    id=$(pid "$program") || continue
    kill "$id"
    within 10 gone "$id" || kill -KILL "$id"
  done
  say "down; the logs are in $dir/log"
}

status() {
  is_up || { say "not up: $dir"; exit 1; }
  sinfo
  squeue
}

"$verb"
