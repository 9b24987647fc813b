#!/usr/bin/env bash
# Trains on a GKE cluster with JobSet and node pools of TPUs or GPUs (as `xpk cluster create` makes it), by kubectl.
#
#   launch/gke/run.sh build --image=REGISTRY/tips_jax:TAG
#   launch/gke/run.sh run --name=NAME --image=... --topology=v5e:4x4 --config=FILE --workdir=gs://BUCKET/FOLDER [-- ...]
#   launch/gke/run.sh run --name=NAME --image=... --gpu=h100 --nodes=4 --config=FILE --workdir=gs://BUCKET/FOLDER
#   launch/gke/run.sh logs | status | delete --name=NAME
#
# build   image of the committed code, and docker push
# run     fills in jobset.yaml and applies it. The bucket appears as /gcs/BUCKET in the pods, and once more for
#         --config.data.*, read-only and with its metadata kept, as /data/BUCKET: a store must not change under a run
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
# --gpu=h100 --nodes=4          GPUs: a100-40gb, a100-80gb, h100, h100-mega, h200, b200 or gb200
# --chips_per_node=N            what a node has: 4 TPU chips as XPK makes them (of ct5lp-hightpu-8t and ct6e-standard-8t
#                               8), 8 GPUs
# --host_network                the nodes' own network: faster between slices (GKE 1.33.3 or newer, for the bucket)
# --queue=multislice-queue      Kueue's queue, on clusters of XPK
# --extra=tpu                   build: which extra to install (GPUs: cuda)
# --commit=HEAD                 build: which commit
# --dry_run                     prints the commands and runs none

# shellcheck source-path=SCRIPTDIR source=../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

name='' image='' topology='' gpu='' nodes='' config='' workdir='' slices=1 spot=false service_account=default namespace=default
max_restarts=100 grace=300 chips_per_node='' host_network=false queue='' extra=tpu commit=HEAD
case ${1-} in -h | --help | '') parse '' --help ;; esac
command=$1
shift
one_of command "$command" 'build run logs status delete'
parse 'name image topology gpu nodes config workdir slices spot service_account namespace max_restarts grace chips_per_node
  host_network queue extra commit' "$@"
# GPUs by --gpu: GKE's name, and how many a node has.
GPU_NAMES='a100-40gb  nvidia-tesla-a100      8
           a100-80gb  nvidia-a100-80gb       8
           h100       nvidia-h100-80gb       8
           h100-mega  nvidia-h100-mega-80gb  8
           h200       nvidia-h200-141gb      8
           b200       nvidia-b200            8
           gb200      nvidia-gb200           4'
KUBECTL=(kubectl "--namespace=$namespace")

# shellcheck disable=SC2034  # manifest reads these by name
# placement: what nodes the pods go to, how many of them, and what each asks for.
placement() {
  if [[ -n $gpu ]]; then gpu_placement; else tpu_placement; fi
  if [[ -n $chips_per_node ]]; then number chips_per_node; fi
}

# shellcheck disable=SC2034
tpu_placement() {
  local chips
  tpu_shape 4
  TPU=${ROW[4]} TOPOLOGY=$SHAPE EXCLUSIVE=cloud.google.com/gke-nodepool
  chips=${chips_per_node:-$((CHIPS < 4 ? CHIPS : 4))}
  ((CHIPS % chips == 0)) ||
    fail "--chips_per_node: got '$chips'; expected a divisor of the $CHIPS chips of $topology"
  TPUS=$chips NODES=$((CHIPS / chips))
}

# One process a node, which has all its GPUs. JobSet names the pods; jax learns from the environment who is who.
# shellcheck disable=SC2034
gpu_placement() {
  need nodes 'the number of nodes'
  number nodes
  row --gpu "$gpu" "$GPU_NAMES" 1
  ((slices == 1)) || fail "--slices: got '$slices'; expected 1: --nodes says how many nodes with GPUs"
  GPU=${ROW[1]} NODES=$nodes GPUS=${chips_per_node:-${ROW[2]}}
  PROCESSES=$nodes COORDINATOR=$name-slice-0-0.$name:8482
  PROCESS_ID="metadata.annotations['batch.kubernetes.io/job-completion-index']"
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
    # shellcheck disable=SC2034
    TPU='' TOPOLOGY='' TPUS='' EXCLUSIVE='' GPU='' GPUS='' PROCESSES='' COORDINATOR='' PROCESS_ID=''
    placement
    main_flags gs
    for i in "${!ARGS[@]}"; do
      case ${ARGS[i]} in
        --config.data.*) ARGS[i]=${ARGS[i]//gs:\/\//\/data/} ;;
        *) ARGS[i]=${ARGS[i]//gs:\/\//\/gcs/} ;;
      esac
    done
    # shellcheck disable=SC2034  # manifest reads these by name
    {
      NAME=$name IMAGE=$image SLICES=$slices MAX_RESTARTS=$max_restarts GRACE=$grace SERVICE_ACCOUNT=$service_account
      # Slices come one after the other, each when its nodes are there: the first ones wait up to an hour.
      ARGUMENTS=$(json --multihost --config.hosts.rendezvous_seconds=3600 "${ARGS[@]}")
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
