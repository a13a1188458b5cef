#!/usr/bin/env bash
# Every static check; the first that complains ends it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/env.sh
source tools/env.sh

ruff check --quiet .
ruff format --check --quiet .
mypy
lint-imports --no-logo
shellcheck --external-sources .ci/run tools/*.sh docker/*.sh
hadolint docker/Dockerfile
check-jsonschema --quiet --builtin-schema vendor.compose-spec docker/compose.yaml
