#!/bin/sh
# Two machines on one, as root: network namespaces that see nothing but each other. NODE is `head`, `second` or `off`.
#   namespaces.sh head ./head.sh       namespaces.sh second ./second.sh
set -eu
node=$1
shift
if [ "$node" = off ]; then
    for name in nezha-head nezha-second; do ip netns delete $name; done
    exit
fi
if ! ip netns list | grep -q nezha-head; then
    for name in nezha-head nezha-second; do ip netns add $name; done
    ip link add to-second netns nezha-head type veth peer name to-head netns nezha-second
    ip -n nezha-head address add 10.77.0.1/24 dev to-second
    ip -n nezha-second address add 10.77.0.2/24 dev to-head
    for link in "nezha-head lo" "nezha-head to-second" "nezha-second lo" "nezha-second to-head"; do
        ip -n ${link% *} link set ${link#* } up
    done
    # vLLM asks the routing table for its own address
    ip -n nezha-head route add default via 10.77.0.2
    ip -n nezha-second route add default via 10.77.0.1
fi
export HEAD=10.77.0.1
exec ip netns exec "nezha-$node" "$@"
