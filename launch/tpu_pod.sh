#!/usr/bin/env bash
# Trains on a Cloud TPU slice that is there, or is created at once.
#
#   launch/tpu_pod.sh run --name=NAME --zone=ZONE --topology=v5e:4x4 --config=FILE --workdir=gs://BUCKET/FOLDER [-- ...]
#   launch/tpu_pod.sh logs | status | stop | delete --name=NAME --zone=ZONE
#
# run     creates the slice unless it exists, sends the committed code, installs it, starts tips_jax.main on all
#         workers and follows the first one's log. A lost connection or Ctrl-C leaves the run alone.
# logs    follows the log again (--worker=3 for another worker)
# status  the slice, and one line a worker
# stop    SIGTERM to all: the run saves and ends. The slice stays, and costs
# delete  deletes the slice. Asks nothing
#
# --project=ID            if it is not gcloud's default
# --spot                  cheaper, and may be taken away: tpu_queued.sh gets it back by itself
# --service_account=MAIL  whom the workers act for (it needs the bucket)
# --runtime=VERSION       the image, if not the usual one of the generation
# --commit=HEAD           which commit to send
# --create_flags='...'    more flags for `tpu-vm create`, such as --create_flags='--network=N --internal-ips'
# --ssh_flags='...'       more flags for ssh and scp, such as --ssh_flags=--internal-ip
# --dry_run               prints the commands and runs none
#
# Ends with the run's exit code: 0 done, 2 bad input, 3 diverged, 75 stopped and saved.

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=tpu.sh
. "$ROOT/launch/tpu.sh"

name='' zone='' project='' topology='' runtime='' spot=false service_account='' commit=HEAD create_flags='' ssh_flags=''
config='' workdir='' worker=0
case ${1-} in -h | --help | '') parse '' --help ;; esac
command=$1
shift
one_of command "$command" 'run logs status stop delete'
parse 'name zone project topology runtime spot service_account commit create_flags ssh_flags config workdir worker' "$@"
need name 'the name of the slice'
need zone 'a zone such as us-west4-a'

TPU=(gcloud compute tpus tpu-vm)
WHERE=("--zone=$zone" ${project:+"--project=$project"})
SLICE=$(quote "--name=$name" "${WHERE[@]}")
read -ra more <<<"$ssh_flags"
SSH=("${TPU[@]}" ssh "$name" "${WHERE[@]}" ${more[@]+"${more[@]}"})
SCP=("${TPU[@]}" scp "${WHERE[@]}" ${more[@]+"${more[@]}"})
ALL=(--worker=all)
FIRST=("--worker=$worker")

state() { lookup "$name" state "${TPU[@]}"; }

create() { run "${TPU[@]}" create "$name" "${WHERE[@]}" --version="$VERSION" "${CREATE[@]}"; }

# present: sees to it that the slice is there and ready.
present() {
  local found
  if $dry_run; then
    note 'is there a slice of this name? Where there is none:'
    state
    create
    return
  fi
  found=$(state)
  case $found in
    '') say "creating $name: $topology, which costs until it is deleted"; create ;;
    READY) say "$name is there" ;;
    STOPPED) run "${TPU[@]}" start "$name" "${WHERE[@]}" ;;
    PREEMPTED | TERMINATED) fail "$name was taken away: $0 delete $SLICE, then run again" ;;
    *) fail "$name is $found; expected READY: run again when it is" ;;
  esac
}

case $command in
  run)
    slice
    main_flags gs
    present
    ship
    start
    code=0
    follow || code=$?
    $dry_run || tell "$code"
    note 'until it is deleted the slice costs:'
    note "$0 delete $SLICE"
    exit $((code == 76 ? 75 : code))
    ;;
  logs) follow ;;
  status) status READY slice ;;
  stop) stop ;;
  delete) run "${TPU[@]}" delete "$name" "${WHERE[@]}" --quiet ;;
esac
