#!/usr/bin/env bash
# Trains on this machine's GPUs, in one process.
#
#   launch/gpu_single.sh --config=FILE --workdir=FOLDER [-- ...]
#
# --gpus=0,1   only these (default: all)
# --dry_run    prints the command and runs nothing
#
# Runs in the foreground with the Python of the shell; Ctrl-C saves and ends with code 75. Exit codes: those of main.

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

config='' workdir='' gpus=''
if (($# == 0)); then parse '' --help; fi
parse 'config workdir gpus' "$@"
main_flags

variables=(JAX_PLATFORMS=cuda)    # an error, rather than the CPU, where jax does not see the GPUs
if [[ -n $gpus ]]; then variables+=("CUDA_VISIBLE_DEVICES=$gpus"); fi
if ! $dry_run; then
  found=$(nvidia-smi --list-gpus 2>/dev/null) || fail 'GPUs: nvidia-smi found none; expected a machine with NVIDIA GPUs'
  say "$(grep -c . <<<"$found") GPU(s): $(head -n 1 <<<"$found")"
  exec env "${variables[@]}" python -m tips_jax.main "${ARGS[@]}"
fi
run env "${variables[@]}" python -m tips_jax.main "${ARGS[@]}"
