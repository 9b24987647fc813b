#!/usr/bin/env bash
# A session on a borrowed GPU: what its products reach, what our step reaches beside a torch.compile twin of it, where the
# time goes, and what the plan had said. docs/measurements.md ("On a borrowed GPU") says how to run it.
#
#   benchmarks/gpu.sh [PART ...] [--output=FOLDER] [--configs=...] [--seconds=570] [-- --config.a.b=value ...]
#
# benchmarks/gpu.py has the parts and flags; here is the environment. Needs no network and installs nothing: wheels of
# what is missing, in a folder .whl beside this one's parent, are unpacked to a temporary folder.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${TMPDIR:-/tmp}/tips_gpu_cache    # of compiled programs: a second command of a session does not compile again
export PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$CACHE/jax}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$CACHE/inductor}
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

PYTHON=${PYTHON:-python3}
if compgen -G "$ROOT/.whl/*.whl" >/dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$CACHE/site" "$ROOT"/.whl/*.whl
  export PYTHONPATH=$PYTHONPATH:$CACHE/site
fi
cd "$ROOT"
exec "$PYTHON" benchmarks/gpu.py "$@"
