#!/bin/sh
# Ask a running server for items: sh examples/curl.sh [URL]
url=${1:-http://127.0.0.1:8000}
model=$(curl -s "$url/v1/models" | sed 's/.*"data":\[{"id":"\([^"]*\)".*/\1/')

curl -s "$url/v1/completions" -H 'Content-Type: application/json' -d '{
  "model": "'"$model"'",
  "prompt": "<item:50><item:172><item:181>",
  "n": 5,
  "vllm_xargs": {"beam_width": 50}
}'
