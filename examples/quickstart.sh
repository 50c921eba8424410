#!/usr/bin/env bash
# Trains a small Qwen3-MoE on real text on 2 ranks, saves it, and reloads it with transformers alone.
#   bash examples/quickstart.sh [--data FILE|FOLDER|DATASET] [--model FAMILY|PATH] [--deepspeed JSON] [--steps N] ...
# Installs into the active virtual environment, or into .venv of this repository. All options: --help.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
start=$SECONDS
if [[ -z ${VIRTUAL_ENV:-} ]]; then
  [[ -d $root/.venv ]] || python3 -m venv "$root/.venv"
  # shellcheck disable=SC1091
  source "$root/.venv/bin/activate"
fi
# Pinned, because a range would download the newest CUDA build where no torch is installed yet.
python -c "import torch" 2>/dev/null || python -m pip install -q torch==2.13.0
python -c "import fluid_hf.integrations.deepspeed" 2>/dev/null || python -m pip install -q -e "$root"
for argument in "$@"; do  # the library is needed for data sets of the Hub only
  if [[ $argument == --data* ]]; then
    python -c "import datasets" 2>/dev/null || python -m pip install -q "datasets>=4,<6"
  fi
done
echo "installed after $((SECONDS - start)) s"

port=$(python -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
if ((gpus >= 2)); then
  exec deepspeed --num_gpus 2 --no_local_rank --master_port "$port" "$here/pretrain.py" "$@"
fi
cores=$(python -c "import os; print(len(os.sched_getaffinity(0)))")
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1)) TOKENIZERS_PARALLELISM=false
exec deepspeed --num_accelerators 2 --no_local_rank --master_port "$port" "$here/pretrain.py" "$@"
