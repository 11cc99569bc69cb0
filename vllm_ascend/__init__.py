# SPDX-License-Identifier: Apache-2.0
"""vLLM on Huawei Ascend NPUs: what vLLM's entry points call.

Two groups in pyproject.toml lead here. `vllm.platform_plugins` asks for the platform when vLLM first wants
one; `vllm.general_plugins` is called once in every process of an engine, before it builds its model.
"""


def register() -> str:
    """The dotted name of the platform; vLLM imports it when it needs it."""
    return "vllm_ascend.platform.NPUPlatform"


def register_connectors() -> None:
    """Make `kv_connector: "MooncakeConnectorV1"` known to vLLM, which imports the class on first use."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    KVConnectorFactory.register_connector(
        "MooncakeConnectorV1", "vllm_ascend.kv_transfer.connector", "MooncakeConnector"
    )
