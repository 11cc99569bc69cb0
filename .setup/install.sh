#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up everything that the examples and the tests need: system packages (where it may), .venv, the pinned stack,
# the build of csrc. What is already there is skipped, so that a second run takes seconds.
# Usage: source it from another script, or run it. Options by environment: PYTHON (an interpreter, 3.11 or later).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
die() { printf 'install: %s\n' "$*" >&2; exit 1; }

# Shared libraries that Mooncake's wheel links, by the Debian package that has them.
readonly LIBRARIES=(
  libibverbs.so.1:libibverbs1 librdmacm.so.1:librdmacm1 libnuma.so.1:libnuma1
  liburing.so.2:liburing2 libcurl.so.4:libcurl4
)

system_packages() {
  local missing=() entry loadable
  loadable=$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p)
  for entry in "${LIBRARIES[@]}"; do
    [[ $loadable == *"${entry%%:*} "* ]] || missing+=("${entry##*:}")
  done
  command -v g++ > /dev/null || missing+=(g++)
  python_interpreter -c 'import ensurepip, venv' 2> /dev/null || missing+=(python3-venv)
  [[ ${#missing[@]} -eq 0 ]] && return
  local apt=(apt-get)
  [[ $(id -u) -eq 0 ]] || apt=(sudo -n apt-get)
  say "system packages: ${missing[*]}"
  if ! command -v apt-get > /dev/null || ! "${apt[@]}" update -qq \
    || ! DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y -qq --no-install-recommends "${missing[@]}" > /dev/null; then
    die "these system packages are missing and could not be installed here: ${missing[*]}; install them (on Debian: apt-get install ${missing[*]}) and run this again"
  fi
}

python_interpreter() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      "$candidate" "$@"
      return
    fi
  done
  die "needs Python 3.11 or later and found none; install python3.11, or name one in PYTHON"
}

# The pinned Python packages, in an order that lets the CPU build of torch and vLLM's kernel-less build stand.
python_packages() {
  local stamp=.venv/.stack wanted
  wanted=$(cat pyproject.toml .setup/* | sha256sum | cut -d' ' -f1)
  [[ -f $stamp && $(cat "$stamp") == "$wanted" ]] && return
  local pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint .setup/constraints.txt)
  say "creating .venv"
  [[ -x .venv/bin/python ]] || python_interpreter -m venv .venv
  say "torch and torch_npu"
  # Word splitting is meant: each word is one requirement.
  # shellcheck disable=SC2046
  "${pip[@]}" $(pins dependencies torch)
  # shellcheck disable=SC2046
  "${pip[@]}" $(pins dependencies torch_npu msgspec pyzmq) $(pins build-system) $(pins extra host ngram build dev)
  say "vLLM, from its source package, without CUDA kernels (a few minutes)"
  # The plugin brings the kernels. Without the version override pip refuses the build that it asked for.
  # shellcheck disable=SC2046
  VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.32.0 TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
    "${pip[@]}" --no-build-isolation --no-binary vllm $(pins dependencies vllm)
  say "torchvision"
  # A folder of its own, named to the processes that prepare pictures. Beside torch's CPU build the registry's
  # torchvision breaks every import of transformers in a process that does not load the plugin.
  # shellcheck disable=SC2046
  "${pip[@]}" --no-deps --upgrade --target .venv/pictures $(pins extra pictures)
  say "vllm-ascend, with the emulated Ascend device"
  PATH="$PWD/.venv/bin:$PATH" TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
    "${pip[@]}" --no-build-isolation --no-deps --editable .
  echo "$wanted" > "$stamp"
}

pins() { .venv/bin/python .setup/pins.py "$@"; }

# Sources of csrc may have changed since the package was installed; ninja knows which.
native_libraries() {
  say "csrc"
  PATH="$PWD/.venv/bin:$PATH" cmake --build build
}

system_packages
python_packages
native_libraries
