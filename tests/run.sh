#!/usr/bin/env bash
# Installs the package with what its tests need and runs them; arguments go to pytest.
#   bash tests/run.sh            all tests that need no GPU, on as many workers as there are cores, at most 4
#   bash tests/run.sh -n 0       the same in one process
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -z ${VIRTUAL_ENV:-} ]]; then
  [[ -d .venv ]] || python3 -m venv .venv
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
# Pinned, because a range would download the newest CUDA build where no torch is installed yet.
python -c "import torch" 2>/dev/null || python -m pip install -q torch==2.13.0
python -m pip install -q -e ".[test]"
cores=$(getconf _NPROCESSORS_ONLN)
# A file's tests share ranks, so they stay together.
python -m pytest -m "not gpu" -q -n $((cores < 4 ? cores : 4)) --dist loadfile --no-loadscope-reorder "$@"
