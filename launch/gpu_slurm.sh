#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster, one process a GPU, and queues itself again when time is up.
#
#   launch/gpu_slurm.sh run --nodes=4 --config=FILE --workdir=FOLDER [-- ...]
#   launch/gpu_slurm.sh logs | status | stop --job=ID
#
# run     submits with the Python environment of this shell. The work folder must be on a file system of all nodes, or
#         in a bucket (pip install 'tips_jax[buckets]', and credentials that all nodes see).
#         120 s before the end of the time the processes get SIGTERM: they save and end with code 75, and the job is
#         queued again under the same number, as after a preemption. Codes 2 and 3 end it.
# logs    follows the log, WORKDIR/slurm-ID.log (--workdir=FOLDER); slurm-ID.log here for one in a bucket
# stop    SIGTERM without queueing again
#
# --gpus=8          GPUs a node
# --cpus=12         CPUs a GPU, for the data workers
# --time=24:00:00   how long the job holds the nodes at a time
# --name=tips_jax   name of the job
# --sbatch_flags='--partition=P --account=A'   more flags for sbatch
# --dry_run         prints the command and runs nothing

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

config='' workdir='' nodes='' gpus=8 cpus=12 time=24:00:00 name=tips_jax sbatch_flags='' job=''
case ${1-} in -h | --help | '') parse '' --help ;; esac
command=$1
shift
one_of command "$command" 'run logs status stop'
parse 'config workdir nodes gpus cpus time name sbatch_flags job' "$@"
logs=$workdir
[[ $workdir != *://* ]] || logs=$PWD  # SLURM itself writes to no bucket

case $command in
  run)
    need nodes 'the number of nodes'
    for flag in nodes gpus cpus; do number $flag; done
    main_flags
    # jax gives process i of a node its GPU i, so every process must see all of its node: no --gpus-per-task.
    flags=(--job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --cpus-per-task="$cpus"
      --time="$time" --signal=TERM@120 --requeue --open-mode=append --output="$logs/slurm-%j.log" --chdir="$PWD")
    read -ra more <<<"$sbatch_flags"
    run mkdir -p "$logs"
    run sbatch "${flags[@]}" ${more[@]+"${more[@]}"} "$ROOT/launch/slurm_job.sh" "${ARGS[@]}"
    ;;
  logs)
    need job 'the number that sbatch printed'
    need workdir 'the folder of the run'
    run tail -n +1 -F "$logs/slurm-$job.log"
    ;;
  status)
    need job 'the number that sbatch printed'
    run squeue --job="$job" --format='%i %T %M of %l on %N (%r)'
    ;;
  stop)
    need job 'the number that sbatch printed'
    run scontrol update JobId="$job" Requeue=0
    run scancel --signal=TERM "$job"
    ;;
esac
