#!/usr/bin/env bash
# Trains on one node of 8 GPUs (8 MI250X GCDs, or 8 CUDA GPUs): one process a GPU, gradients averaged over all.
#   ./run_8gpu.sh --data /path/to/images            any flag of `python ireasoner.py --help` may follow
#   ./run_8gpu.sh --data /path/to/images --resume   goes on after an interruption
#   NPROC=4 ./run_8gpu.sh --data ...                fewer GPUs
#   NPROC=2 DEVICE=cpu ./run_8gpu.sh --data ...     no GPU: two processes on the CPU
set -euo pipefail
cd "$(dirname "$0")"

# One CPU thread a process does for feeding a GPU; more would only fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

device=()
if [ -n "${DEVICE:-}" ]; then
  device=(--device "$DEVICE")
fi
exec torchrun --standalone --nproc_per_node="${NPROC:-8}" ireasoner.py "${device[@]}" "$@"
