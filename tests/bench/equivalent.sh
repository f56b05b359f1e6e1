#!/bin/bash
# What `make bench` measures netloom beside: the same work by a plain script. Each step is a fresh ssh, as is the question
# before it whether the host is there; each object is made by a process of its own.
#
#     equivalent.sh HOST KEY prepare|event|life|clear
set -euo pipefail
host=$1 key=$2 work=$3
netns=bench-script
public=198.51.100.10 second=198.51.100.11

over_ssh() {
    ssh -F none -q -i "$key" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "root@$host" "$@"
}
step() { # the host, then the commands of the step, in one ssh
    over_ssh "echo ok" >/dev/null
    over_ssh "set -e; ns() { ip netns exec $netns \"\$@\"; }; $1"
}

implement() {
    step "ip netns add $netns
    ip link add brbench type bridge
    ip link set brbench up
    ip link add vhbench type veth peer name gst netns $netns
    ip link set vhbench master brbench
    ip link set vhbench up
    ns ip link set lo up
    ns ip link set gst up
    ns ip addr add 10.30.1.1/24 dev gst
    ns sysctl -qw net.ipv4.ip_forward=1
    ns nft add table ip bench
    ns nft add chain ip bench pre '{ type nat hook prerouting priority -100; }'
    ns nft add chain ip bench post '{ type nat hook postrouting priority 100; }'
    ns nft add chain ip bench forwarded '{ type filter hook forward priority 0; }'
    ns nft add chain ip bench listed
    ns nft add rule ip bench forwarded iifname gst accept
    ns nft add rule ip bench forwarded oifname gst ct state established,related accept
    ns nft add rule ip bench forwarded jump listed"
}
assign_ip() {
    step "ns ip link show pub >/dev/null 2>&1 || ip link add vpbench type veth peer name pub netns $netns
    ip link set vpbench up
    ns ip link set pub up
    ns ip addr add $1/24 dev pub
    ns ip route replace default via 198.51.100.1 dev pub
    ns nft add rule ip bench post ip saddr 10.30.1.0/24 oifname pub snat to $1
    ns nft add rule ip bench forwarded ip saddr 10.30.1.0/24 oifname pub accept"
}
add_port_forward() {
    step "ns nft add rule ip bench pre ip daddr $public tcp dport $1 dnat to 10.30.1.10:22
    ns nft add rule ip bench forwarded ip daddr 10.30.1.10 tcp dport 22 accept
    ns nft add rule ip bench forwarded ip saddr 10.30.1.10 tcp sport 22 accept"
}
delete_rule() { # by its handle, as nft needs it
    echo "ns nft -a list chain ip bench $1 | sed -n 's/.*$2.*handle //p' | while read at; do
        ns nft delete rule ip bench $1 handle \$at; done"
}
dnsmasq_restarted() {
    echo "kill \$(cat /run/bench.pid) 2>/dev/null || true
    ns dnsmasq --conf-file=/dev/null --no-hosts --no-resolv --bind-interfaces --interface=gst --pid-file=/run/bench.pid \
        --dhcp-range=10.30.1.0,static --dhcp-hostsfile=/run/bench.hosts --addn-hosts=/run/bench.names --leasefile-ro \
        --user=root $1"
}
firewall() { # $1 rules
    local lines="ns nft flush chain ip bench listed" at
    for ((at = 0; at < $1; at++)); do
        lines+="
        ns nft add rule ip bench listed ip daddr $public tcp dport $((1000 + at)) accept"
    done
    step "$lines"
}

life() { # the 21 operations of an isolated network, in the order of tests/bench/calls.py
    implement
    assign_ip $public
    step "touch /run/bench.hosts /run/bench.names; $(dnsmasq_restarted --port=0)"
    step "$(dnsmasq_restarted "")"
    step "echo 02:01:00:00:00:01,10.30.1.10 >/run/bench.hosts"
    step "kill -HUP \$(cat /run/bench.pid)"
    step "echo 10.30.1.10 vm-1 >/run/bench.names; kill -HUP \$(cat /run/bench.pid)"
    step "mkdir -p /run/bench.data; for at in 1 2 3 4 5 6 7 8 9 10 11 12 13; do echo \$at >/run/bench.data/\$at; done"
    firewall 20
    assign_ip $second
    step "ns nft insert rule ip bench pre ip daddr $second dnat to 10.30.1.10
    ns nft insert rule ip bench post ip saddr 10.30.1.10 oifname pub snat to $second
    ns nft add rule ip bench forwarded ip daddr 10.30.1.10 accept
    ns nft add rule ip bench forwarded ip saddr 10.30.1.10 accept"
    add_port_forward 2222
    step "ns nft add rule ip bench pre ip daddr $public tcp dport 80 dnat to 10.30.1.10:8080
    ns nft add rule ip bench pre ip daddr $public tcp dport 443 dnat to 10.30.1.10:8443"
    step "$(delete_rule pre "dport 2222")"
    step "$(delete_rule pre "daddr $second"); $(delete_rule post "saddr 10.30.1.10 ")"
    step "ns ip addr del $second/24 dev pub; $(delete_rule post "snat to $second")"
    step "rm /run/bench.hosts; touch /run/bench.hosts; kill -HUP \$(cat /run/bench.pid)"
    step "for at in \$(seq 100); do echo 02:01:00:00:01:\$at,10.30.1.\$((at + 10)); done >/run/bench.hosts
    kill -HUP \$(cat /run/bench.pid)"
    step "ns nft list ruleset >/dev/null; ns ip addr >/dev/null; ns ip route >/dev/null"
    step "kill \$(cat /run/bench.pid); ns nft delete table ip bench; ip link del vhbench; ip link del vpbench"
    step "ip netns del $netns; ip link del brbench; rm -rf /run/bench.data /run/bench.hosts /run/bench.names"
}

case $work in
prepare) implement && assign_ip $public ;;
event) add_port_forward "$4" ;;
life) life ;;
clear) over_ssh "ip netns del $netns; ip link del brbench" ;;
esac
