#!/usr/bin/env bash
# A real SLURM on this machine: a controller and one node, for the tests of the cluster recipes. Needs root.
#   one_node_slurm.sh start DIR [CPUS]   installs slurm-wlm and munge (Debian) where they are missing, and starts them
#   one_node_slurm.sh stop DIR           stops what `start DIR` started
# State, logs, key and socket lie under DIR, ports are free ones: nothing of another SLURM is touched.
# Then:  export SLURM_CONF=DIR/slurm.conf; sinfo; sbatch …
set -euo pipefail

usage() { sed -n '2,6p' "$0" | cut -c3-; exit 2; }
(($# >= 2)) || usage
verb=$1
mkdir -p "$2"
dir=$(cd "$2" && pwd)
cpus=${3:-2}
export SLURM_CONF=$dir/slurm.conf

fail() { echo "$1" >&2; stop; exit 1; }

stop() {
  local name pid
  if [[ -s $dir/slurmctld.pid ]]; then  # or the processes of jobs would stay behind
    timeout 5 scancel --user="$(id -un)" || true
    for _ in {1..100}; do [[ -z $(timeout 5 squeue -h 2>/dev/null) ]] && break; sleep 0.2; done
  fi
  for name in slurmd slurmctld munged; do
    [[ -s $dir/$name.pid ]] || continue
    pid=$(<"$dir/$name.pid")
    kill "$pid" 2>/dev/null || true
    for _ in {1..100}; do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    rm -f "$dir/$name.pid"
  done
}

provide() {
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
  command -v apt-get >/dev/null || { echo "SLURM is not installed, and there is no apt-get" >&2; exit 3; }
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge; } \
    >"$dir/install.log" 2>&1 || { echo "SLURM cannot be installed, see $dir/install.log" >&2; exit 3; }
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

configure() {
  local host; host=$(hostname -s)
  cat >"$SLURM_CONF" <<CONF
ClusterName=onenode
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for as long as its credential lasts, 120 s by default.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=15
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
  ((EUID == 0)) || { echo "SLURM's daemons need root" >&2; exit 3; }
  provide
  mkdir -p "$dir"/{state,spool,log}
  [[ -s $dir/munge.key ]] || (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
  munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --seed-file="$dir/munge.seed" --log-file="$dir/log/munged.log" || fail "munged does not start, see $dir/log"
  configure
  slurmctld -f "$SLURM_CONF" || fail "slurmctld does not start, see $dir/log"
  slurmd -f "$SLURM_CONF" || fail "slurmd does not start, see $dir/log"
  for _ in {1..80}; do
    [[ $(sinfo -h -o %T 2>/dev/null) == idle ]] && { echo "SLURM is up: export SLURM_CONF=$SLURM_CONF"; return; }
    sleep 0.5
  done
  fail "SLURM did not come up, see $dir/log"
}

case $verb in start) start ;; stop) stop ;; *) usage ;; esac
