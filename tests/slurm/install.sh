#!/usr/bin/env bash
# Installs the named packages (Slurm, shellcheck) for the tests, where it may. None of their services is started.
set -euo pipefail
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "not tested here is what needs them: only root on Debian can install $*"
	[ "${FLIP_REQUIRE_SLURM:-}" != 1 ] || exit 77
	exit 0
fi
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
	trap 'rm -f "$policy"' EXIT
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod +x "$policy"
fi
echo "installing for the tests: $*"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "$@" >/dev/null
