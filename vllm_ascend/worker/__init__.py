# SPDX-License-Identifier: Apache-2.0
"""One process of an engine: its device, its model runner, and kernels that stand in for Triton's."""
