#!/usr/bin/env bash
# Trains a small Qwen3-MoE on real text on 2 ranks, saves it, and reloads it with transformers alone.
#   bash examples/quickstart.sh [--data FILE|FOLDER|DATASET] [--model FAMILY|PATH] [--deepspeed JSON] [--steps N] ...
# Installs into the active virtual environment, or into .venv of this repository. All options: --help.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
start=$SECONDS

if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
  if [[ ! -f $root/.venv/bin/activate ]]; then
    echo "making $root/.venv"
    if ! python3 -m venv "$root/.venv"; then
      rm -rf "$root/.venv"
      echo "python3 has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2
      exit 1
    fi
  fi
  # shellcheck disable=SC1091
  source "$root/.venv/bin/activate"
fi

# `has` asks for installed packages from another folder: here, the checkout itself would count as installed.
has() { (cd / && python -c "from importlib.metadata import version; [version(name) for name in '$*'.split()]") 2>/dev/null; }
install() { echo "installing: $*" && python -m pip install -q --disable-pip-version-check "$@"; }
# Pinned to a version with wheels both for GPUs and for CPUs, and before the rest, whose wider range would take the newest.
has torch || install torch==2.13.0
has fluid-hf torch transformers accelerate deepspeed || install -e "$root"
data=
for argument in "$@"; do
  case $argument in
    -h | --help) exec python "$here/pretrain.py" --help ;;
    --data=*) data=${argument#--data=} ;;
    *) [[ ${previous:-} != --data ]] || data=$argument ;;
  esac
  previous=$argument
done
[[ -z $data || -e $data ]] || has datasets || install "datasets>=4,<6" # for data sets of the Hub only
echo "ready after $((SECONDS - start)) s"

# Below those that the system gives to connections: the launcher takes seconds until it listens.
port=$(python -c "
import random, socket
for port in random.SystemRandom().sample(range(12000, 30000), 100):
    try:
        socket.socket().bind(('127.0.0.1', port))
    except OSError:
        continue
    print(port)
    break")
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
launch=(deepspeed --no_local_rank --master_port "$port" --log_level warning)
if ((gpus >= 2)); then
  # The launcher takes the GPUs from this variable only where no option names them.
  CUDA_VISIBLE_DEVICES=$(cut -d, -f1,2 <<<"${CUDA_VISIBLE_DEVICES:-0,1}")
  export CUDA_VISIBLE_DEVICES
else
  cores=$(python -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
  export DS_ACCELERATOR=cpu OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1))
  launch+=(--num_accelerators 2)
fi
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false} # the data loader forks after the tokenizer has run
"${launch[@]}" "$here/pretrain.py" "$@"
echo "finished after $((SECONDS - start)) s, installation included"
