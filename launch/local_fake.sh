#!/usr/bin/env bash
# Several processes with fake CPU devices on this machine: what a pod does, in small.
#
#   launch/local_fake.sh --processes=2 --devices=4 --config=configs/quickstart.py:runlocal --workdir=FOLDER [-- ...]
#
# --processes=2     so many processes
# --devices=4       devices a process
# --port=N          where the first process waits for the others (default: a free one)
# --program='...'   what to run instead of `python -m tips_jax.main --multihost`; its arguments follow --
# --dry_run         prints the commands and runs none
#
# Lines of process i begin with [i]. SIGTERM and Ctrl-C go to all processes as SIGTERM. Ends with the worst code of
# all: 2 or 3 (do not try again) before any other, that before 75 (saved), that before 0.

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

config='' workdir='' processes=2 devices=4 port='' program=''
if (($# == 0)); then parse '' --help; fi
parse 'config workdir processes devices port program' "$@"
number processes
number devices
if [[ -n $program ]]; then
  read -ra program <<<"$program"
  ARGS=(${REST[@]+"${REST[@]}"})
else
  main_flags
  program=(python -m tips_jax.main --multihost)
fi
if $dry_run; then
  port=${port:-8476}    # as good as any
elif [[ -z $port ]]; then
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

variables=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes" JAX_PLATFORMS=cpu
  "NPROC=${NPROC:-32}" "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")

prefixed() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

pids=()
for ((i = 0; i < processes; i++)); do
  started=(env "${variables[@]}" "JAX_PROCESS_ID=$i" "${program[@]}" ${ARGS[@]+"${ARGS[@]}"})
  if $dry_run; then
    quote "${started[@]}"
  else
    "${started[@]}" > >(prefixed "$i") 2>&1 &
    pids+=($!)
  fi
done
if $dry_run; then exit; fi

signalled=
trap 'signalled=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
worst=0
rank() { case $1 in 0) echo 0 ;; 75) echo 1 ;; 2 | 3) echo 3 ;; *) echo 2 ;; esac; }
for i in "${!pids[@]}"; do
  code=0
  wait "${pids[i]}" || code=$?
  while [[ $signalled ]]; do    # a signal ends `wait` early
    signalled='' code=0
    wait "${pids[i]}" || code=$?
  done
  say "process $i ended with code $code"
  if (($(rank $code) > $(rank $worst))); then worst=$code; fi
done
wait    # for the last lines
exit "$worst"
