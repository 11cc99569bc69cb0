#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh machine to disaggregated serving: sets up what is missing, then starts a prefill engine (tensor parallel 2),
# a decode engine (tensor parallel 1), a router and one ordinary engine on emulated Ascend devices, and compares their answers.
# `--on-cards` uses the machine's own NPUs instead (four of them).
set -euo pipefail
cd "$(dirname "$0")/.."
. .setup/install.sh
exec .venv/bin/python -u examples/quickstart.py "$@"
