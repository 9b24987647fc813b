#!/usr/bin/env bash
# Trains on Cloud TPU slices that are waited for, and gets them back when they are taken away.
#
#   launch/tpu_queued.sh run --name=NAME --zone=ZONE --topology=v5p:8x8x8 --config=FILE --workdir=gs://BUCKET/FOLDER \
#     [--spot] [--slices=2] [-- ...]
#   launch/tpu_queued.sh logs | status | stop | delete --name=NAME --zone=ZONE
#
# run     asks for the slices (a queued resource), waits until they are there, sends the code, starts tips_jax.main and
#         follows the first worker's log. When they are taken away it deletes the request, makes a new one, and the run
#         goes on from its last checkpoint. When the run is done the slices are released. After bad input (code 2) or
#         divergence (3) it stops and says so; the slices stay, and cost, for the mended command.
#         It must keep running (tmux, a small VM); if it dies, the run does not: the same command takes it up again.
# logs    follows the log again (--worker=3 --node=1 for another worker, another slice)
# status  the request, and one line a worker
# stop    SIGTERM to all: the run saves and ends, and `run` ends too. The slices stay, and cost
# delete  deletes the request and its slices. Asks nothing
#
# --project=ID            if it is not gcloud's default
# --spot                  cheaper, and may be taken away
# --slices=1              so many slices of this topology (multi-slice)
# --service_account=MAIL  whom the workers act for (it needs the bucket)
# --runtime=VERSION       the image, if not the usual one of the generation
# --commit=HEAD           which commit to send
# --create_flags='...'    more flags for `queued-resources create`, such as --create_flags=--valid-until-duration=12h
# --ssh_flags='...'       more flags for ssh and scp, such as --ssh_flags=--tunnel-through-iap
# --poll=30               seconds between two looks at the request
# --max_crashes=20        how often it starts again after another end than a signal or a lost machine
# --dry_run               prints the commands and runs none
#
# Ends with the run's exit code: 0 done, 2 bad input, 3 diverged, 75 stopped and saved.

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=tpu.sh
. "$ROOT/launch/tpu.sh"

name='' zone='' project='' topology='' runtime='' spot=false slices=1 service_account='' commit=HEAD create_flags=''
ssh_flags='' config='' workdir='' worker=0 node=0 poll=30 max_crashes=20
case ${1-} in -h | --help | '') parse '' --help ;; esac
command=$1
shift
one_of command "$command" 'run logs status stop delete'
parse 'name zone project topology runtime spot slices service_account commit create_flags ssh_flags config workdir
  worker node poll max_crashes' "$@"
need name 'the name of the request'
need zone 'a zone such as us-west4-a'
number slices
number max_crashes

QUEUE=(gcloud compute tpus queued-resources)
WHERE=("--zone=$zone" ${project:+"--project=$project"})
SLICE=$(quote "--name=$name" "${WHERE[@]}")
read -ra more <<<"$ssh_flags"
SSH=("${QUEUE[@]}" ssh "$name" "${WHERE[@]}" ${more[@]+"${more[@]}"})
SCP=("${QUEUE[@]}" scp "${WHERE[@]}" ${more[@]+"${more[@]}"})
ALL=(--node=all --worker=all)
FIRST=("--node=$node" "--worker=$worker")

state() { lookup "$name" state.state "${QUEUE[@]}"; }

request() {
  local nodes=(--node-id="$name")
  if ((slices > 1)); then nodes=(--node-count="$slices" --node-prefix="$name"); fi
  run "${QUEUE[@]}" create "$name" "${WHERE[@]}" "${nodes[@]}" --runtime-version="$VERSION" "${CREATE[@]}"
}

release() { run "${QUEUE[@]}" delete "$name" "${WHERE[@]}" --force --quiet; }

# supervise: from the request to the end of the run, whatever happens to the slices.
supervise() {
  local found last='' shipped=false crashes=0 failures=0 code
  while true; do
    found=$(state) || { say 'gcloud failed; trying again'; sleep "$poll"; continue; }
    [[ $found == "$last" ]] || say "$name: ${found:-no request yet}"
    last=$found
    case $found in
      '')
        request || {
          ((++failures < 3)) || fail "$name: asking failed three times; expected slices: see above (quota? zone?)"
          sleep "$poll"
        }
        ;;
      ACTIVE)
        failures=0
        code=0
        $shipped || ship || code=$?
        if ((code == 0)); then
          shipped=true
          start || code=$?
        fi
        ((code != 0)) || follow || code=$?
        case $code in
          0) tell 0; release; return ;;
          2 | 3) tell "$code"; say "the slices stay, and cost: $0 delete $SLICE"; return "$code" ;;
          76) tell 76; return 75 ;;
          75) say 'stopped by a signal, saved: starting again' ;;
          255) say 'no connection: looking at the request' ;;
          *)
            say "ended with code $code: crash $((++crashes)), at most $max_crashes"
            ((crashes <= max_crashes)) || { say "the slices stay, and cost: $0 delete $SLICE"; return "$code"; }
            ;;
        esac
        sleep "$poll"
        if ((code != 255)); then on "${ALL[@]}" -- 'bash tips_run/worker.sh clear' || true; fi
        ;;
      SUSPENDED | FAILED)
        if [[ $found == FAILED ]] && ((++failures == 3)); then
          run "${QUEUE[@]}" describe "$name" "${WHERE[@]}"
          fail "$name: three requests in a row failed; expected slices: see the last one above (quota? zone?)"
        fi
        release || sleep "$poll"
        shipped=false crashes=0
        ;;
      *) sleep "$poll" ;;
    esac
  done
}

rehearse() {
  note 'is there a request of this name? Where there is none:'
  state
  request
  note "every $poll s, until the answer is ACTIVE:"
  state
  ship
  start
  follow
  note 'code 0: release the slices and end. 2, 3: end. Any other: look at the request; ACTIVE: clear the workers, start'
  on "${ALL[@]}" -- 'bash tips_run/worker.sh clear'
  note 'SUSPENDED or FAILED: release what is left, and begin again at the top'
  release
}

case $command in
  run)
    slice
    main_flags gs
    if $dry_run; then rehearse; exit; fi
    trap 'say "the run goes on without this script; the same command takes it up again"; exit 130' INT
    code=0
    supervise || code=$?
    exit "$code"
    ;;
  logs) follow ;;
  status) status ACTIVE request ;;
  stop) stop ;;
  delete) release ;;
esac
