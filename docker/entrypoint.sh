#!/usr/bin/env bash
# Runs a command in the node's environment; a mounted vendor workspace comes first and wins.
set -eo pipefail
if [ -n "${VENDOR_SETUP-}" ]; then
    [ -f "$VENDOR_SETUP" ] || {
        echo "VENDOR_SETUP: found no file $VENDOR_SETUP, expected the setup.bash of a mounted workspace" >&2
        exit 1
    }
    # shellcheck source=/dev/null
    source "$VENDOR_SETUP"
fi
# shellcheck source=tools/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tools/env.sh"
exec "$@"
