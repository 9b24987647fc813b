#!/usr/bin/env bash
# The job of gpu_slurm.sh: SLURM runs it on the first node. Its arguments are those of tips_jax.main.
set -uo pipefail

MOST_RESTARTS=100    # after which a crash is final
# srun no longer takes it from the job (SLURM 22.05), and would give each process one CPU.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# The first process that ends must not take those along that still save.
srun --kill-on-bad-exit=0 python -m tips_jax.main --multihost "$@"
code=$?
case $code in
  0 | 2 | 3) exit $code ;;    # done; nothing to gain by trying again
esac
# 75: saved, or another process was lost. Any other: a crash, or srun's own code where a node went away.
if ((code != 75 && ${SLURM_RESTART_COUNT:-0} >= MOST_RESTARTS)); then
  echo "ended with code $code after ${SLURM_RESTART_COUNT} restarts: not queued again" >&2
else
  scontrol requeue "$SLURM_JOB_ID" || echo 'not queued again' >&2
fi
exit $code
