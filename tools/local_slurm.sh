#!/usr/bin/env bash
# A real Slurm on this machine, for the tests marked `slurm` and for trying out `submit`.
#
#   tools/local_slurm.sh up       install what lacks (Debian, Ubuntu), start munge and Slurm;
#                                 `up --accounting` with a database too, for sacct
#   tools/local_slurm.sh down     end them and remove their folder
#   tools/local_slurm.sh env      print what makes sbatch and the others use it: eval "$(... env)"
#
# Needs root. Two nodes of two CPUs each, both this machine; partitions `batch` (jobs here are
# preempted by those of `urgent`, after 60 seconds' notice) and `urgent`. Everything lies in
# LOCAL_SLURM (default /tmp/local-slurm); a Slurm that the machine has besides is left alone.
set -euo pipefail

folder=${LOCAL_SLURM:-/tmp/local-slurm}
host=$(hostname -s)

accounting=none
export SLURM_CONF=$folder/slurm.conf

install_if_missing() { # packages, "-", commands that come with them
    local packages=() service
    while [[ $1 != - ]]; do packages+=("$1") && shift; done
    shift
    [[ $(command -v "$@" | wc -l) != "$#" ]] || return 0
    command -v apt-get >/dev/null || fail "$* are not installed, and there is no apt-get to do it"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}"
    # The packages start services of their own, which are not the ones that are wanted.
    for service in munge slurmctld slurmd slurmdbd mariadb; do
        service "$service" stop >/dev/null 2>&1 || true
    done
}

fail() {
    echo "local_slurm.sh: $*" >&2
    exit 1
}

write_configuration() {
    install -d -m 755 "$folder" "$folder/spool" "$folder/state" "$folder/log" "$folder/munge"
    [[ -f $folder/munge/key ]] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
    local nodes="" port=16820 name
    for name in n1 n2; do
        nodes+="NodeName=$name NodeHostname=$host NodeAddr=127.0.0.1 Port=$port CPUs=2 RealMemory=4000"
        nodes+=$'\n'
        port=$((port + 1))
    done
    cat >"$folder/slurm.conf" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# Queued again after seconds instead of two minutes: what was signed for the last start has expired.
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
# No cgroups, so that it runs in a container too.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
# Nodes are larger here than the machine: they share it.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
KillWait=10
OverTimeLimit=0
MinJobAge=600
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/$accounting
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
AccountingStoragePass=$folder/munge/socket
$nodes
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 MaxTime=INFINITE State=UP PreemptMode=OFF
END
}

retry() { # whose log has the reason, a command
    local log=$folder/log/$1.log
    shift
    for _ in $(seq 60); do
        timeout 5 "$@" >/dev/null 2>&1 && return
        sleep 0.5
    done
    fail "$1 has no success: see $log"
}

start_accounting() {
    install -d -m 755 "$folder/mysql"
    mariadb-install-db --no-defaults --user=root --datadir="$folder/mysql" >/dev/null
    mariadbd --no-defaults --user=root --datadir="$folder/mysql" --socket="$folder/mysql.socket" \
        --bind-address=127.0.0.1 --port=16806 --pid-file="$folder/mysql.pid" \
        --innodb-buffer-pool-size=64M >"$folder/log/mysql.log" 2>&1 &
    retry mysql mariadb --no-defaults --socket="$folder/mysql.socket" --execute="
        CREATE USER slurm@localhost IDENTIFIED BY 'local'; GRANT ALL ON *.* TO slurm@localhost"
    cat >"$folder/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
PidFile=$folder/slurmdbd.pid
LogFile=$folder/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=16806
StorageUser=slurm
StoragePass=local
END
    chmod 600 "$folder/slurmdbd.conf"
    slurmdbd
    retry slurmdbd sacctmgr --immediate add cluster local
}

up() {
    [[ $EUID = 0 ]] || fail "start it as root"
    install_if_missing slurm-wlm munge - slurmctld slurmd sbatch munged
    if [[ $accounting = slurmdbd ]]; then
        install_if_missing slurmdbd mariadb-server - slurmdbd mariadbd
    fi
    [[ ! -d $folder ]] || down
    write_configuration
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
        --pid-file="$folder/munge/pid" --log-file="$folder/log/munged.log" \
        --seed-file="$folder/munge/seed"
    [[ $accounting = none ]] || start_accounting
    slurmctld -c
    local name
    for name in n1 n2; do
        slurmd -N "$name" -c
    done
    for _ in $(seq 60); do
        [[ $(sinfo --noheader --states=idle --format=%D --partition=batch 2>/dev/null) = 2 ]] && return
        sleep 0.5
    done
    fail "the nodes do not come up: see $folder/log"
}

down() {
    local pid file
    for file in "$folder"/slurmd-*.pid "$folder/slurmctld.pid" "$folder/slurmdbd.pid" \
        "$folder/mysql.pid" "$folder/munge/pid"; do
        [[ -f $file ]] || continue
        pid=$(<"$file")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 50); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.2
        done
    done
    rm -rf "$folder"
}

case ${1-} in
up)
    [[ ${2-} != --accounting ]] || accounting=slurmdbd
    up
    ;;
down) down ;;
env) echo "export SLURM_CONF=$folder/slurm.conf" ;;
*)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
    exit 2
    ;;
esac
