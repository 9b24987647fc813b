# What tpu_pod.sh and tpu_queued.sh share: slices, and runs on their workers. Sourced after common.sh.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # variables of the scripts that source this
#
# They set SSH and SCP (gcloud's commands without workers), ALL and FIRST (the flags for all workers and the first),
# WHERE (zone and project) and SLICE (what names the slice on their own command line).

# slice: VERSION of --topology, and CREATE, what creating a slice takes besides. A shape in three dimensions is
# named as such: a type of Cloud TPU such as v5p-1024 stands for one shape of its size.
slice() {
  local which
  tpu_shape 2
  if ((ROW[1] == 3)); then
    which=("--type=${ROW[2]}" "--topology=$SHAPE")
  else
    which=("--accelerator-type=${ROW[2]}-$CHIPS")
  fi
  VERSION=${runtime:-${ROW[3]}}
  read -ra CREATE <<<"$create_flags"
  CREATE=("${which[@]}" --scopes=https://www.googleapis.com/auth/cloud-platform
    ${CREATE[@]+"${CREATE[@]}"})
  if [[ -n $service_account ]]; then CREATE+=("--service-account=$service_account"); fi
  if $spot; then CREATE+=(--spot); fi
}

# lookup NAME FIELD COMMAND: the state of the resource; nothing where there is none; an error where gcloud has one.
# (`describe` fails alike for what does not exist and for what one may not see.)
lookup() {
  local name=$1 field=$2
  shift 2
  run "$@" list "${WHERE[@]}" --filter="name~/$name\$" --format="value($field)"
}

# on WHERE... -- COMMAND: the command on these workers. 255: the connection failed.
on() {
  local where=()
  while [[ $1 != -- ]]; do where+=("$1"); shift; done
  run "${SSH[@]}" "${where[@]}" --command="$2"
}

# ship: the committed code and its environment, on all workers, each commit in a folder of its own.
ship() {
  local id code archive
  id=$(git -C "$ROOT" rev-parse --short=12 --verify --quiet "$commit^{commit}") || fail "--commit: got '$commit';" \
    'expected a commit of this repository'
  git -C "$ROOT" diff --quiet HEAD || say "uncommitted changes stay here: the workers get commit $id"
  code=tips_jax-$id archive=${TMPDIR:-/tmp}/tips_jax-$id.tar.gz
  run git -C "$ROOT" archive --format=tar.gz --prefix="$code/" --output="$archive" "$id" &&
    run "${SCP[@]}" "$archive" "$name:" "${ALL[@]}" &&
    on "${ALL[@]}" -- "tar -xzf $code.tar.gz && bash $code/launch/worker.sh install"
}

start() { on "${ALL[@]}" -- "bash tips_run/worker.sh start $BUCKET $(quote "${ARGS[@]}")"; }

# follow: the first worker's log; its exit code.
follow() { on "${FIRST[@]}" -- 'bash tips_run/worker.sh follow'; }

# status STATE KIND: what gcloud and, in this state, the workers say. `state` is the script's.
status() {
  local found
  found=$(state)
  printf '%s\n' "${found:-no $2 of this name}"
  if [[ $found == "$1" ]] || $dry_run; then on "${ALL[@]}" -- 'bash tips_run/worker.sh status'; fi
}

stop() { on "${ALL[@]}" -- 'bash tips_run/worker.sh stop'; }

# tell CODE: what became of the run, and what it means.
tell() {
  case $1 in
    0) say 'done' ;;
    2) say 'bad input: the line above says which; nothing to gain by trying again' ;;
    3) say 'diverged: see the line above; nothing to gain by trying again' ;;
    75 | 76) say 'stopped and saved: the same command goes on' ;;
    255) say "the connection broke; the run goes on: $0 logs $SLICE" ;;
    *) say "ended with code $1: see the log; the same command goes on from the last checkpoint" ;;
  esac
}
