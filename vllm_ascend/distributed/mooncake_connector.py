# SPDX-License-Identifier: Apache-2.0
"""Where deployments look for the connector by module path.

Their `--kv-transfer-config` names this module in `kv_connector_module_path` and a class of it in
`kv_connector`. Without a module path `MooncakeConnectorV1` is found by its name alone.
"""

from vllm_ascend.kv_transfer.connector import MooncakeConnector

MooncakeConnectorV1 = MooncakeConnector

__all__ = ["MooncakeConnector", "MooncakeConnectorV1"]
