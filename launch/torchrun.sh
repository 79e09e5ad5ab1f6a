#!/usr/bin/env bash
# Trains a recipe on this machine, or on several, on each of which this script is started.
#
#   launch/torchrun.sh RECIPE [flags of `rorqual train`]
#   NNODES=2 HEAD=first-machine launch/torchrun.sh RECIPE     # the same line on both
#
# NPROC_PER_NODE: processes of a machine [default: its GPUs, or 1]. NNODES x NPROC_PER_NODE must be the ranks of the
# recipe's [parallel]. PORT: of HEAD [29500]. RUN_ID: other runs on the same HEAD have another [rorqual].
# MAX_RESTARTS: how often all ranks begin again from the last checkpoint when one dies [3]. SHUTDOWN_SECONDS: how long
# they have to save after SIGTERM [280].
set -euo pipefail
if [ $# -eq 0 ]; then
    echo "usage: launch/torchrun.sh RECIPE [flags of rorqual train]" >&2
    exit 2
fi
num_gpus() { nvidia-smi --list-gpus 2>/dev/null | wc -l; }
: "${NNODES:=1}" "${HEAD:=}" "${PORT:=29500}" "${RUN_ID:=rorqual}" "${MAX_RESTARTS:=3}" "${SHUTDOWN_SECONDS:=280}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SHUTDOWN_SECONDS
: "${NPROC_PER_NODE:=$(gpus=$(num_gpus || true); echo $((gpus > 0 ? gpus : 1)))}"
if [ "$NNODES" -eq 1 ]; then
    meeting=(--standalone)
else
    meeting=(--rdzv-backend c10d --rdzv-endpoint "${HEAD:?the first of the machines}:$PORT" --rdzv-id "$RUN_ID")
fi
exec torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "$MAX_RESTARTS" \
    "${meeting[@]}" -m -- rorqual train "$@" # without --, torchrun takes --run for one of its own
