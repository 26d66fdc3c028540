#!/bin/sh
# The machine with the address HEAD: one engine of two, and the API for both. Further arguments go to `nezha serve`.
exec nezha serve "${CHECKPOINT:-demo/checkpoint}" --host 0.0.0.0 --port "${PORT:-8000}" \
    --data-parallel-size 2 --data-parallel-size-local 1 \
    --data-parallel-address "${HEAD:?address of the first machine}" --data-parallel-rpc-port "${RPC_PORT:-13345}" "$@"
