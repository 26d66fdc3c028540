#!/bin/sh
# The other machine: one engine, no API. Same checkpoint, catalogue and further arguments as on the first.
exec nezha serve "${CHECKPOINT:-demo/checkpoint}" --headless \
    --data-parallel-size 2 --data-parallel-size-local 1 --data-parallel-start-rank 1 \
    --data-parallel-address "${HEAD:?address of the first machine}" --data-parallel-rpc-port "${RPC_PORT:-13345}" "$@"
