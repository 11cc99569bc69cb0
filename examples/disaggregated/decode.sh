#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One decode engine. Every option is visible here; the environment can change the ones that hosts differ in.
# LAUNCHER="python -m vllm_ascend.emulator" runs it on emulated devices, an empty one on the machine's NPUs.
set -euo pipefail
cd "$(dirname "$0")/../.."

MODEL=${MODEL:-examples/recall_model}
DEVICES=${DEVICES:-2}
TENSOR_PARALLEL=${TENSOR_PARALLEL:-1}
HTTP_PORT=${HTTP_PORT:-8200}
KV_HOST=${KV_HOST:-127.0.0.1} # the address of this host

# shellcheck disable=SC2086
VLLM_HOST_IP=$KV_HOST ASCEND_RT_VISIBLE_DEVICES=$DEVICES exec ${LAUNCHER:-} vllm serve "$MODEL" \
  --port "$HTTP_PORT" \
  --tensor-parallel-size "$TENSOR_PARALLEL" \
  --max-model-len 1024 \
  --kv-transfer-config '{
    "kv_connector": "MooncakeConnectorV1",
    "kv_role": "kv_consumer"
  }'
