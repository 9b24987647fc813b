# What the scripts of this folder share: flags, dry runs, errors. Sourced, never run.
# shellcheck shell=bash disable=SC2034,SC2154  # variables of the scripts that source this
#
# A script declares its flags as variables that hold the defaults and calls `parse`. true or false makes a boolean.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REST=()          # the arguments of tips_jax.main: --config.* flags, and everything after --
dry_run=false

# Each TPU of tips_jax/core/chips.py (a test compares): the dimensions of its slices, and its names at Cloud TPU (the
# type, the image) and at GKE. -: it is not there.
TPU_NAMES='v4     3  v4         tpu-ubuntu2204-base  tpu-v4-podslice
           v5e    2  v5litepod  v2-alpha-tpuv5-lite  tpu-v5-lite-podslice
           v5p    3  v5p        v2-alpha-tpuv5       tpu-v5p-slice
           v6e    2  v6e        v2-alpha-tpuv6e      tpu-v6e-slice
           tpu7x  3  -          -                    tpu7x'

say() { printf '== %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

# parse 'flag names' ARGUMENTS: sets the variables of these names, $dry_run and REST; --help prints the script's head.
parse() {
  local known=" ${1//$'\n'/ } dry_run " key value
  shift
  while (($#)); do
    case $1 in
      --) shift; REST+=("$@"); break ;;
      --config.*=*) REST+=("$1"); shift; continue ;;
      -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      --*) key=${1#--}; key=${key%%=*} ;;
      *) fail "arguments: got '$1'; expected flags, written --name=value, and main's own after -- (see --help)" ;;
    esac
    if [[ $1 == *=* ]]; then value=${1#*=}; else value=; fi
    if [[ $key == no* && $known != *" $key "* && $known == *" ${key#no} "* && $1 != *=* ]]; then
      key=${key#no} value=false
    fi
    if [[ $known != *" $key "* ]]; then
      fail "--$key: unknown flag; did you mean --$(nearest "$key" "$known")? (see --help)"
    elif [[ ${!key} == true || ${!key} == false ]]; then
      value=${value:-true}
      [[ $value == true || $value == false ]] || fail "--$key: got '$value'; expected true or false"
    elif [[ $1 != *=* && $# -gt 1 && $2 != -* ]]; then
      value=$2
      shift
    fi
    [[ -n $value ]] || fail "--$key: missing value; expected --$key=VALUE"
    printf -v "$key" %s "$value"
    shift
  done
}

# need FLAG WHAT: an error that says what was expected, unless the flag has a value.
need() { [[ -n ${!1} ]] || fail "--$1: missing; expected $2"; }

# one_of WHAT VALUE 'choices'
one_of() { [[ " $3 " == *" $2 "* ]] || fail "$1: got '$2'; expected one of: $3; did you mean $(nearest "$2" "$3")?"; }

# number FLAG: an error unless the flag is a whole number from 1.
number() { [[ ${!1} =~ ^[1-9][0-9]*$ ]] || fail "--$1: got '${!1}'; expected a whole number from 1"; }

# nearest WORD 'words': the one with the smallest edit distance.
nearest() {
  awk -v a="$1" -v words="$2" 'BEGIN {
    n = split(words, w, " "); best = 1e9
    for (k = 1; k <= n; k++) {
      b = w[k]; for (j = 0; j <= length(b); j++) d[0, j] = j
      for (i = 1; i <= length(a); i++) { d[i, 0] = i; for (j = 1; j <= length(b); j++) {
        x = d[i-1, j-1] + (substr(a, i, 1) != substr(b, j, 1))
        if (d[i-1, j] + 1 < x) x = d[i-1, j] + 1
        if (d[i, j-1] + 1 < x) x = d[i, j-1] + 1
        d[i, j] = x } }
      if (d[length(a), length(b)] < best) { best = d[length(a), length(b)]; word = b } }
    print word }'
}

# row FLAG NAME TABLE COLUMN: ROW, the words of the line of a table that begins with NAME; COLUMN must not be -.
row() {
  local cells names=''
  while read -ra cells; do
    [[ ${cells[$4]} != - ]] || continue
    names+=" ${cells[0]}"
    if [[ ${cells[0]} == "$2" ]]; then ROW=("${cells[@]}"); fi
  done <<<"$3"
  one_of "$1" "$2" "${names# }"
}

# tpu_shape COLUMN: SHAPE and CHIPS of --topology, a slice that exists, and ROW, of TPU_NAMES; COLUMN must be there.
tpu_shape() {
  local generation=${topology%%:*} small='2x2x1 2x2x2 2x2x4 2x4x4' sides
  need topology 'GENERATION:SHAPE such as v5e:4x4, as python -m tips_jax.plan takes it'
  SHAPE=${topology#*:}
  row --topology "$generation" "$TPU_NAMES" "$1"
  [[ $topology == *:* && $SHAPE =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    fail "--topology: got '$topology'; expected GENERATION:SHAPE such as v5e:4x4 or v5p:8x8x8"
  read -ra sides <<<"${SHAPE//x/ }"
  CHIPS=$((sides[0] * sides[1] * ${sides[2]:-1}))
  if ((ROW[1] == 2)); then
    one_of "--topology: shape of $generation" "$SHAPE" '1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16'
    return
  fi
  # From a cube of 4 x 4 x 4 on a slice is of whole cubes, the shortest side first.
  [[ " $small " == *" $SHAPE "* ]] || ((${#sides[@]} == 3 && sides[0] % 4 + sides[1] % 4 + sides[2] % 4 == 0 &&
    sides[0] <= sides[1] && sides[1] <= sides[2])) ||
    fail "--topology: got '$topology'; expected one of: $small, or sides that are multiples of 4 and ascend" \
      'such as 4x4x12'
}

# quote WORDS: one line that a shell reads back as these words.
quote() {
  local word line='' q="'\\''"
  for word in "$@"; do
    case $word in '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$q}'" ;; esac
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# note TEXT: a comment between the commands of a dry run.
note() { if $dry_run; then printf '# %s\n' "$*"; fi; }

# run COMMAND: runs it, or with --dry_run prints it.
run() { if $dry_run; then quote "$@"; else "$@"; fi; }

# main_flags [gs]: ARGS becomes the arguments of tips_jax.main. With gs, the work folder must be in a bucket, BUCKET,
# which every other gs:// path shares: the buckets are mounted one by one, and one is enough.
main_flags() {
  local arg
  need config 'a file such as configs/vitb.py'
  need workdir 'a folder for the run'
  ARGS=("--config=$config" "--workdir=$workdir" ${REST[@]+"${REST[@]}"})
  [[ ${1-} == gs ]] || return 0
  [[ $workdir == gs://?*/?* ]] || fail "--workdir: got '$workdir'; expected gs://BUCKET/FOLDER, which all workers share"
  BUCKET=${workdir#gs://}
  BUCKET=${BUCKET%%/*}
  for arg in "${ARGS[@]}"; do
    [[ $arg != *gs://* || $arg == *"gs://$BUCKET/"* ]] ||
      fail "${arg%%=*}: got '${arg#*=}'; expected a path in the bucket of --workdir, gs://$BUCKET"
  done
}
