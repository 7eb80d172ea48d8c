#!/bin/bash
# One node of a Slurm job, started by iterate.sbatch: torchrun with a rank for every GPU.
#
#   node.sh FIRST_NODE ARGUMENT...      RANKS_PER_NODE=N for another number of ranks
set -u
first=$1
shift

# Slurm signals this shell alone or all that runs on the node, depending on its set-up. USR1 is for the ranks: torchrun
# would die of it.
(
    trap '' USR1
    # The name that Slurm has for a node is one that the others can resolve; its own may not be.
    exec torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${RANKS_PER_NODE:-gpu}" --local-addr "$SLURMD_NODENAME" \
        --rdzv-backend c10d --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 20000))" \
        --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-conf "is_host=$((SLURM_NODEID == 0))" \
        scripts/iterate.py "$@"
) &
agent=$!
trap 'pkill -USR1 -P "$agent"' USR1
trap 'kill -TERM "$agent"' TERM INT

while kill -0 "$agent" 2>/dev/null; do
    wait "$agent" # ends with every signal, not with the agent alone
done
wait "$agent"
