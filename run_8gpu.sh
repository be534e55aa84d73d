#!/usr/bin/env bash
# Trains on nodes of 8 GPUs (MI250X: 8 GCDs a node; or CUDA GPUs): one process a GPU, gradients averaged over all.
#   ./run_8gpu.sh --data /path/to/images              any flag of `python ireasoner.py --help` may follow
# The same command again goes on after an interruption: it always passes --resume, which continues a run or starts it.
# What training can refuse is refused before the processes start, with status 2. On one node a process that dies takes
# the others along, and all start again from the newest checkpoint.
#   NPROC=4 ./run_8gpu.sh --data ...                  fewer GPUs
#   SCRIPT=mine.py ./run_8gpu.sh --data ...           an edited copy of ireasoner.py
#   NPROC=2 DEVICE=cpu ./run_8gpu.sh demo             no GPU: the demo on two processes
# Several nodes, under SLURM. SIGTERM five minutes before the end leaves time for the step in flight and its checkpoint;
# nothing restarts here, but --requeue starts the job again after a node failed, and it goes on by itself:
#   sbatch --exclusive --nodes=4 --gpus-per-node=8 --requeue --open-mode=append --signal=TERM@300 \
#     --wrap "srun --ntasks-per-node=1 --cpus-per-task=64 ./run_8gpu.sh --data ..."
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 ./run_8gpu.sh --data ...           by hand, once on each node
# Several nodes need a file system in common for --data, --output_dir and the Hugging Face cache.
# More settings: MASTER_PORT (29500), MAX_RESTARTS (3 on one node), MIN_FREE_GB (48), PYTHON (python).
set -euo pipefail

python="${PYTHON:-python}"
script="${SCRIPT:-$(dirname "$0")/ireasoner.py}"
nproc="${NPROC:-8}"
nnodes="${NNODES:-${SLURM_NNODES:-1}}"
node_rank="${NODE_RANK:-${SLURM_NODEID:-0}}"

if [ "${DEVICE:-auto}" = cpu ]; then
  set -- "$@" --device cpu
fi
set -- "$@" --resume
# Too few or occupied GPUs would only show minutes later, as a hang or an out-of-memory error of some rank.
"$python" - "$nproc" "${MIN_FREE_GB:-48}" "${DEVICE:-auto}" <<'PYTHON' || exit 2
import sys

import torch

wanted, least, device = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if version < (2, 12):
    print("run_8gpu.sh: torch before 2.12 gives a step 30 seconds after SIGTERM or Ctrl-C. A longer one is lost, with at "
          "most --save_every steps before it", file=sys.stderr)
found = torch.cuda.device_count()
if device != "cpu" and found < wanted:
    sys.exit(f"run_8gpu.sh: {found} GPUs, {wanted} wanted: set NPROC={found or 1}"
             + (", or DEVICE=cpu to try it without a GPU" if not found else ""))
for gpu in range(wanted if device != "cpu" else 0):
    free = torch.cuda.mem_get_info(gpu)[0] / 1e9
    if free < least:
        sys.exit(f"run_8gpu.sh: GPU {gpu} has {free:.0f} GB free, {least:.0f} wanted: end what else runs there "
                 "(rocm-smi, nvidia-smi), or lower MIN_FREE_GB")
PYTHON
case "${1:-}" in
  -* | train) if [ "$node_rank" = 0 ]; then "$python" "$script" "$@" --dry_run; fi ;;
esac
cores=$(env -u OMP_NUM_THREADS nproc)
if [ "$cores" -lt "$nproc" ]; then
  echo "run_8gpu.sh: $nproc processes share $cores cores, which slows all of them; srun needs --cpus-per-task" >&2
fi

# One CPU thread a process does for feeding a GPU; more would only fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# So many seconds torchrun waits after SIGTERM for processes that are ending, not 30 (torch 2.12 or later).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}"
# MIOpen (ROCm) keeps its kernel cache in $HOME by default: locks on a network home make ranks wait for each other.
export MIOPEN_USER_DB_PATH="${MIOPEN_USER_DB_PATH:-${TMPDIR:-/tmp}/miopen-${USER:-user}-$node_rank}"
export MIOPEN_CUSTOM_CACHE_DIR="${MIOPEN_CUSTOM_CACHE_DIR:-$MIOPEN_USER_DB_PATH}"
mkdir -p "$MIOPEN_USER_DB_PATH"
rendezvous=(--standalone --max-restarts="${MAX_RESTARTS:-3}")
if [ "$nnodes" -gt 1 ]; then
  if [ -d /sys/class/net/hsn0 ]; then  # the fast interfaces of a Slingshot machine, not its management network
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-hsn}" GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-hsn0}"
  fi
  if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  fi
  # No restarts: after one, the nodes would not agree where to meet.
  rendezvous=(--nnodes="$nnodes" --node_rank="$node_rank" --rdzv_backend=c10d --rdzv_id="${SLURM_JOB_ID:-ireasoner}"
              --rdzv_conf=read_timeout=900  # node 0 comes last, after its dry run
              --rdzv_endpoint="${MASTER_ADDR:?set MASTER_ADDR to the host name of node 0}:${MASTER_PORT:-29500}")
fi
exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node="$nproc" "$script" "$@"
