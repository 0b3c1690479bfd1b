#!/usr/bin/env bash
# Installs what demo, tests and bench need from Debian's packages. Idempotent; a second run looks at PATH only.
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"

# program:package
needed=(gcc:gcc redis-server:redis-server redis-cli:redis-tools nginx:nginx-light sqlite3:sqlite3 python3:python3 gunicorn:gunicorn zstd:zstd
        perl:perl make:make openssl:openssl memcached:memcached socat:socat dbus-daemon:dbus-daemon dbus-send:dbus-bin
        mandoc:mandoc pg_ctlcluster:postgresql jq:jq crit:criu nft:nftables ip:iproute2 setsid:util-linux mount:mount
        mkfs.btrfs:btrfs-progs mkfs.xfs:xfsprogs tmux:tmux script:bsdutils node:nodejs erl:erlang-base
        supervisord:supervisor)
missing=()
for pair in "${needed[@]}"; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
# The workloads are compiled against the C library's headers.
[ -e /usr/include/stdio.h ] || missing+=(libc6-dev)
[ ${#missing[@]} -eq 0 ] && exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "setup: missing ${missing[*]}, and neither root nor sudo to install them; tests that need them are skipped" >&2
        exit 0
    fi
    as_root=(sudo)
fi
if ! command -v apt-get >/dev/null; then
    echo "setup: missing ${missing[*]}, and no apt-get to install them; tests that need them are skipped" >&2
    exit 0
fi

echo "setup: installing ${missing[*]}" >&2
# Packages of servers start them on installation; policy-rc.d says no to that, unless someone has set one up.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee $policy >/dev/null
    "${as_root[@]}" chmod 755 $policy
    trap '"${as_root[@]}" rm -f $policy' EXIT
fi
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq update >&2
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >&2
