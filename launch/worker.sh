#!/usr/bin/env bash
# The part of tpu_pod.sh and tpu_queued.sh that runs on every worker of a TPU slice.
#
#   worker.sh install             make the environment of the code that this file belongs to
#   worker.sh start BUCKET ARGS   mount the bucket, start tips_jax.main with ARGS; it outlives the connection
#   worker.sh follow              its output until it ends; ends with its exit code
#   worker.sh status | stop       one line; SIGTERM, so that it saves, and wait
#   worker.sh clear               as stop, but before a restart: nobody asked the run to end
#
# State is in ~/tips_run: log (and log.1, the one before), pid, exit, command, code -> the code.
set -euo pipefail

RUN=$HOME/tips_run
GCS=${TIPS_GCS:-/gcs}                 # gs://BUCKET/x is $GCS/BUCKET/x in the arguments of main,
DATA=${TIPS_DATA:-/data}              # and $DATA/BUCKET/x, read-only, in --config.data.*
PATIENCE=${TIPS_PATIENCE:-600}        # seconds that saving may take
HUGE_PAGES=${TIPS_HUGE_PAGES:-/sys/kernel/mm/transparent_hugepage/enabled}
ASKED=76                              # exit code of `follow` where 75 came of `stop`

# After a restart of the machine the number may belong to another process.
alive() { [[ -f $RUN/pid ]] && grep -qs tips_run/worker.sh "/proc/$(cat "$RUN/pid")/cmdline"; }

install() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  export PATH=$HOME/.local/bin:$PATH
  # The system's Python is older than 3.11 on the images of TPU VMs; uv brings the newest along that .ci/run tests.
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  [[ -x .venv/bin/python ]] || uv venv --quiet --python 3.13 .venv
  uv pip install --quiet --python .venv/bin/python '.[tpu]'
  mkdir -p "$RUN"
  ln -sfn "$PWD" "$RUN/code"
  cp launch/worker.sh "$RUN/worker.new"    # renamed, not overwritten: a shell may be reading the old one
  mv "$RUN/worker.new" "$RUN/worker.sh"
}

# mount_bucket BUCKET FOLDER OPTIONS
mount_bucket() {
  local bucket=$1 folder=$2/$1
  shift 2
  mountpoint -q "$folder" && return
  if ! command -v gcsfuse >/dev/null; then
    local apt=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    curl -fsS "$apt/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $apt gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
    sudo apt-get update -q && sudo apt-get install -qy gcsfuse
  fi
  sudo mkdir -p "$folder"
  sudo chown "$(id -u)" "$folder"
  gcsfuse --implicit-dirs "$@" "$bucket" "$folder"
}

start() {
  local bucket=$1
  shift
  local command
  command="$(readlink "$RUN/code") $*"
  if alive; then
    [[ $(cat "$RUN/command") == "$command" ]] || { echo 'error: another run is under way: stop it first' >&2; exit 2; }
    echo "$(hostname): runs already"
    return
  fi
  # Workers read what the others have just written, so nothing about files may be remembered (the default on these
  # machines is: for ever). Renaming folders is how a checkpoint becomes complete.
  mount_bucket "$bucket" "$GCS" --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0
  # A store never changes: what is known of its files is kept.
  mount_bucket "$bucket" "$DATA" -o ro --metadata-cache-ttl-secs=-1 --stat-cache-max-size-mb=-1 --type-cache-max-size-mb=-1
  local argument arguments=()
  for argument in "$@"; do
    case $argument in
      --config.data.*) arguments+=("${argument//gs:\/\//$DATA/}") ;;
      *) arguments+=("${argument//gs:\/\//$GCS/}") ;;
    esac
  done
  # libtpu warns that it starts and ends slowly where the system does not give huge pages to all.
  [[ ! -e $HUGE_PAGES ]] || echo always | sudo tee "$HUGE_PAGES" >/dev/null || echo 'warning: no huge pages' >&2
  rm -f "$RUN/exit" "$RUN/asked"
  [[ ! -f $RUN/log ]] || mv "$RUN/log" "$RUN/log.1"
  echo "$command" >"$RUN/command"
  cd "$RUN/code"
  setsid bash "$RUN/worker.sh" child "${arguments[@]}" </dev/null >"$RUN/log" 2>&1 &
  echo $! >"$RUN/pid"
  echo "$(hostname): started"
}

# The process that `start` leaves behind: passes SIGTERM on, and writes the exit code down.
child() {
  local code=0 signalled=''
  .venv/bin/python -m tips_jax.main --multihost "$@" &
  local pid=$!
  trap 'signalled=1; kill -TERM $pid' TERM
  trap '' HUP
  wait $pid || code=$?
  while [[ $signalled ]]; do
    signalled='' code=0
    wait $pid || code=$?
  done
  echo $code >"$RUN/exit.new"
  mv "$RUN/exit.new" "$RUN/exit"
}

result() {
  local code
  code=$(cat "$RUN/exit" 2>/dev/null || echo 137)    # no code: killed, or the machine went down
  [[ $code == 75 && -f $RUN/asked ]] && code=$ASKED
  echo "$code"
}

follow() {
  [[ -f $RUN/log ]] || { echo 'error: no run here: start one' >&2; exit 2; }
  tail -n +1 -F --pid="$(cat "$RUN/pid")" -s 0.1 "$RUN/log" 2>/dev/null || true
  exit "$(result)"
}

status() {
  if alive; then
    echo "$(hostname): runs: $(tail -n 1 "$RUN/log")"
  elif [[ -f $RUN/pid ]]; then
    echo "$(hostname): ended with code $(result)"
  else
    echo "$(hostname): no run"
  fi
}

clear() {
  alive || return 0
  local pid second
  pid=$(cat "$RUN/pid")
  kill -TERM "$pid"
  for ((second = 0; second < PATIENCE * 5; second++)); do
    alive || return 0
    sleep 0.2
  done
  kill -KILL -- "-$pid"    # the group: the shell and main
}

stop() {
  if alive; then touch "$RUN/asked"; fi
  clear
  status
}

case ${1-} in
  install | start | child | follow | status | stop | clear) "$@" ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
