#!/bin/sh
# Two engines behind one port, each with the whole model. Further arguments go to `nezha serve`.
exec nezha serve "${CHECKPOINT:-demo/checkpoint}" --port "${PORT:-8000}" --data-parallel-size "${ENGINES:-2}" "$@"
