#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up what is missing, then runs every test on emulated Ascend devices. Arguments go to pytest: a folder, -k NAME, ...
set -euo pipefail
cd "$(dirname "$0")/.."
. .setup/install.sh
. .venv/bin/activate

# Processes of two cores: more threads than cores make every rank wait for the others.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

say "csrc/emulator/runtime, without Python"
ctest --test-dir build --output-on-failure --no-tests=error
say "tests on emulated devices"
exec python -m vllm_ascend.emulator --devices 8 --memory 1GiB python -m pytest --durations=20 "$@"
