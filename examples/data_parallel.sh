#!/bin/sh
# Two engines behind one port, and how many requests each has answered: sh examples/data_parallel.sh [CHECKPOINT]
checkpoint=${1:-demo/checkpoint}
nezha serve "$checkpoint" --data-parallel-size 2 &
server=$!
trap 'kill $server; wait $server' EXIT
until curl -sf http://127.0.0.1:8000/health > /dev/null; do kill -0 $server || exit 1; sleep 1; done

for _ in 1 2 3 4 5 6 7 8; do sh examples/curl.sh > /dev/null & asked="$asked $!"; done
wait $asked
curl -s http://127.0.0.1:8000/metrics | grep '^vllm:request_success_total' | grep -v ' 0.0$'
