#!/usr/bin/env bash
# Trains on a GKE cluster with TPU node pools and JobSet (as `xpk cluster create` makes it), by kubectl.
#
#   launch/gke/run.sh build --image=REGISTRY/tips_jax:TAG
#   launch/gke/run.sh run --name=NAME --image=... --topology=v5e:4x4 --config=FILE --workdir=gs://BUCKET/FOLDER [-- ...]
#   launch/gke/run.sh logs | status | delete --name=NAME
#
# build   image of the committed code, and docker push
# run     fills in jobset.yaml and applies it. The bucket appears as /gcs/BUCKET in the pods
# logs    follows the first process
# status  the JobSet and its pods
# delete  SIGTERM to all, so that the run saves; then it is gone. `run` with the same work folder goes on
#
# --slices=1                    so many slices of this topology (multi-slice)
# --spot                        on spot nodes
# --service_account=default     the Kubernetes account that may use the bucket
# --namespace=default
# --max_restarts=100            after preemptions, lost nodes and crashes; codes 2 and 3 end the JobSet at once
# --grace=300                   seconds between SIGTERM and SIGKILL
# --chips_per_node=N            default: 4; all chips where v5e and v6e have them on one node
# --host_network                the nodes' own network: faster between slices (GKE 1.33.3 or newer, for the bucket)
# --queue=multislice-queue      Kueue's queue, on clusters of XPK
# --extra=tpu                   build: which extra to install
# --commit=HEAD                 build: which commit
# --dry_run                     prints the commands and runs none

# shellcheck source-path=SCRIPTDIR source=../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

name='' image='' topology='' config='' workdir='' slices=1 spot=false service_account=default namespace=default
max_restarts=100 grace=300 chips_per_node='' host_network=false queue='' extra=tpu commit=HEAD
case ${1-} in -h | --help | '') parse '' --help ;; esac
command=$1
shift
one_of command "$command" 'build run logs status delete'
parse 'name image topology config workdir slices spot service_account namespace max_restarts grace chips_per_node
  host_network queue extra commit' "$@"
KUBECTL=(kubectl "--namespace=$namespace")

# shellcheck disable=SC2034  # manifest reads these by name
# placement: ACCELERATOR, TOPOLOGY, CHIPS_PER_NODE and NODES of one slice of --topology.
placement() {
  local generation=${topology%%:*} side chips=1
  need topology 'GENERATION:SHAPE such as v5e:4x4, as python -m tips_jax.plan takes it'
  one_of --topology "$generation" 'v4 v5e v5p v6e'
  TOPOLOGY=${topology#*:}
  [[ $topology == *:* && $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    fail "--topology: got '$topology'; expected GENERATION:SHAPE such as v5e:4x4 or v5p:8x8x8"
  for side in ${TOPOLOGY//x/ }; do chips=$((chips * side)); done
  case $generation in
    v4) ACCELERATOR=tpu-v4-podslice ;;
    v5e) ACCELERATOR=tpu-v5-lite-podslice ;;
    v5p) ACCELERATOR=tpu-v5p-slice ;;
    v6e) ACCELERATOR=tpu-v6e-slice ;;
  esac
  CHIPS_PER_NODE=4
  case $generation in v5e | v6e) if ((chips <= 8)); then CHIPS_PER_NODE=$chips; fi ;; esac
  if [[ -n $chips_per_node ]]; then number chips_per_node; CHIPS_PER_NODE=$chips_per_node; fi
  ((chips % CHIPS_PER_NODE == 0)) ||
    fail "--chips_per_node: got '$CHIPS_PER_NODE'; expected a divisor of the $chips chips of $topology"
  NODES=$((chips / CHIPS_PER_NODE))
}

# json WORDS: a JSON list without its brackets.
json() {
  local word list=''
  for word in "$@"; do
    word=${word//\\/\\\\}
    list+=", \"${word//\"/\\\"}\""
  done
  printf '%s' "${list#, }"
}

# manifest: jobset.yaml, filled in.
# shellcheck disable=SC2016  # the dollar signs are the template's
manifest() {
  local line key filled
  while IFS= read -r line; do
    filled=''
    while [[ $line == *'${'* ]]; do
      key=${line#*'${'}
      key=${key%%\}*}
      [[ -n ${!key} ]] || continue 2
      filled+=${line%%'${'*}${!key}
      line=${line#*\}}
    done
    printf '%s\n' "$filled$line"
  done <"$ROOT/launch/gke/jobset.yaml"
}

case $command in
  build)
    need image 'a name such as us-docker.pkg.dev/PROJECT/REPOSITORY/tips_jax:1'
    docker=(docker build --file launch/gke/Dockerfile --build-arg "EXTRA=$extra" --tag "$image" -)
    if $dry_run; then
      printf '%s | %s\n' "$(quote git -C "$ROOT" archive "$commit")" "$(quote "${docker[@]}")"
    else
      git -C "$ROOT" diff --quiet HEAD || say "uncommitted changes stay out: the image has commit $commit"
      git -C "$ROOT" archive "$commit" | "${docker[@]}"
    fi
    run docker push "$image"
    ;;
  run)
    need name 'a name for the run'
    need image 'the image that build pushed'
    for flag in slices max_restarts grace; do number $flag; done
    [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name: got '$name'; expected small letters, digits and -"
    placement
    main_flags gs
    # shellcheck disable=SC2034  # manifest reads these by name
    {
      NAME=$name IMAGE=$image SLICES=$slices MAX_RESTARTS=$max_restarts GRACE=$grace SERVICE_ACCOUNT=$service_account
      # Slices come one after the other, each when its nodes are there: the first ones wait up to an hour.
      ARGUMENTS=$(json --multihost --config.hosts.rendezvous_seconds=3600 "${ARGS[@]//gs:\/\//\/gcs/}")
      QUEUE_LABELS='' SPOT_SELECTOR='' HOST_NETWORK='' DNS_POLICY='' HOST_NETWORK_IDENTITY=''
      if [[ -n $queue ]]; then QUEUE_LABELS="labels: {kueue.x-k8s.io/queue-name: $queue}"; fi
      if $spot; then SPOT_SELECTOR='cloud.google.com/gke-spot: "true"'; fi
      if $host_network; then
        HOST_NETWORK='hostNetwork: true' DNS_POLICY='dnsPolicy: ClusterFirstWithHostNet'
        HOST_NETWORK_IDENTITY='hostNetworkPodKSA: "true"'
      fi
    }
    if $dry_run; then
      printf "%s <<'EOF'\n%s\nEOF\n" "$(quote "${KUBECTL[@]}" apply --filename=-)" "$(manifest)"
    else
      manifest | "${KUBECTL[@]}" apply --filename=-
      say "follow it: $0 logs $(quote "--name=$name" "--namespace=$namespace")"
    fi
    ;;
  *)
    need name 'the name of the run'
    all=jobset.sigs.k8s.io/jobset-name=$name
    first=$all,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
    case $command in
      logs) run "${KUBECTL[@]}" logs --follow --tail=-1 --container=tips --selector="$first" ;;
      status)
        run "${KUBECTL[@]}" get jobset "$name"
        run "${KUBECTL[@]}" get pods --selector="$all" --output=wide
        ;;
      delete) run "${KUBECTL[@]}" delete jobset "$name" ;;
    esac
    ;;
esac
