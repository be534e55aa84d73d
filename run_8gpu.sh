#!/usr/bin/env bash
# Trains on nodes of 8 GPUs (MI250X: 8 GCDs a node; or CUDA GPUs): one process a GPU, gradients averaged over all.
#   ./run_8gpu.sh --data /path/to/images              any flag of `python ireasoner.py --help` may follow
# The same command again goes on after an interruption: it always passes --resume, which continues a run or starts it.
#   NPROC=4 ./run_8gpu.sh --data ...                  fewer GPUs
#   srun --nodes=4 --ntasks-per-node=1 ./run_8gpu.sh --data ...               several nodes under SLURM
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 ./run_8gpu.sh --data ...           several nodes by hand, once on each
#   NPROC=2 DEVICE=cpu ./run_8gpu.sh demo             no GPU: the demo on two processes
# Several nodes need a file system in common for --data, --output_dir and the Hugging Face cache.
# More settings: MASTER_PORT (29500), MAX_RESTARTS (3), MIN_FREE_GB (40), PYTHON (python).
set -euo pipefail

python="${PYTHON:-python}"
nproc="${NPROC:-8}"
nnodes="${NNODES:-${SLURM_NNODES:-1}}"
node_rank="${NODE_RANK:-${SLURM_NODEID:-0}}"

if [ "${DEVICE:-auto}" = cpu ]; then
  set -- "$@" --device cpu
else
  # Too few or occupied GPUs would only show minutes later, as a hang or an out-of-memory error of some rank.
  "$python" - "$nproc" "${MIN_FREE_GB:-40}" <<'PYTHON'
import sys

import torch

wanted, least = int(sys.argv[1]), float(sys.argv[2])
found = torch.cuda.device_count()
if found < wanted:
    sys.exit(f"run_8gpu.sh: {found} GPUs, {wanted} wanted: set NPROC={found or 1}"
             + (", or DEVICE=cpu to try it without a GPU" if not found else ""))
for gpu in range(wanted):
    free = torch.cuda.mem_get_info(gpu)[0] / 1e9
    if free < least:
        sys.exit(f"run_8gpu.sh: GPU {gpu} has {free:.0f} GB free, {least:.0f} wanted: end what else runs there "
                 "(rocm-smi, nvidia-smi), or lower MIN_FREE_GB")
PYTHON
fi

# One CPU thread a process does for feeding a GPU; more would only fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# After SIGTERM (preemption) torchrun waits this long, in seconds, for the step in flight and its checkpoint, not 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"
# A collective that fails must end its process instead of hanging, so that torchrun can restart all of them.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# MIOpen (ROCm) keeps its kernel cache in $HOME by default: locks on a network home make ranks wait for each other.
export MIOPEN_USER_DB_PATH="${MIOPEN_USER_DB_PATH:-${TMPDIR:-/tmp}/miopen-${USER:-user}-$node_rank}"
export MIOPEN_CUSTOM_CACHE_DIR="${MIOPEN_CUSTOM_CACHE_DIR:-$MIOPEN_USER_DB_PATH}"
mkdir -p "$MIOPEN_USER_DB_PATH"
if [ "$nnodes" -gt 1 ] && [ -z "${NCCL_SOCKET_IFNAME:-}" ] && [ -d /sys/class/net/hsn0 ]; then
  # RCCL/NCCL may pick the slow management network of a Slingshot machine; hsn* are its fast interfaces.
  export NCCL_SOCKET_IFNAME=hsn
fi

if [ "$nnodes" -gt 1 ]; then
  if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  fi
  rendezvous=(--nnodes="$nnodes" --node_rank="$node_rank" --rdzv_backend=c10d --rdzv_id="${SLURM_JOB_ID:-ireasoner}"
              --rdzv_endpoint="${MASTER_ADDR:?set MASTER_ADDR to the host name of node 0}:${MASTER_PORT:-29500}")
else
  rendezvous=(--standalone)
fi
# A rank that dies takes the others along; torchrun then starts all of them again with the same flags, so --resume is
# what makes them continue from the newest checkpoint.
exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node="$nproc" \
  --max-restarts="${MAX_RESTARTS:-3}" "$(dirname "$0")/ireasoner.py" "$@" --resume
