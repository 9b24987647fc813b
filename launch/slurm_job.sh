#!/usr/bin/env bash
# The job of gpu_slurm.sh: SLURM runs it on the first node. Its arguments are those of tips_jax.main.
set -uo pipefail

# The first process that ends must not take those along that still save.
srun --kill-on-bad-exit=0 python -m tips_jax.main --multihost "$@"
code=$?
# 134 and 137: another node went away.
if ((code == 75 || code == 134 || code == 137)); then
  scontrol requeue "$SLURM_JOB_ID" || echo 'not queued again' >&2
fi
exit $code
