# SPDX-License-Identifier: Apache-2.0
"""torch_npu's fused operators behind vLLM's registration points: one file per family, all with `register`."""
