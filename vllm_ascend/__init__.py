# SPDX-License-Identifier: Apache-2.0
"""vLLM on Huawei Ascend NPUs: what vLLM's entry points call.

Two groups in pyproject.toml lead here. `vllm.platform_plugins` asks for the platform when vLLM first wants
one; `vllm.general_plugins` is called once in every process of an engine, before it builds its model.
"""


def register() -> str:
    """The dotted name of the platform; vLLM imports it when it needs it.

    vLLM asks before it imports transformers, the last moment at which torchvision can be helped.
    """
    from vllm_ascend.compat import declare_operators_that_torchvision_lacks

    declare_operators_that_torchvision_lacks()
    return "vllm_ascend.platform.NPUPlatform"


def prepare_process() -> None:
    """Name the connector `MooncakeConnectorV1` to vLLM, which imports its class on first use; spare cores."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from vllm_ascend.compat import sleep_while_waiting_where_cores_are_few

    KVConnectorFactory.register_connector(
        "MooncakeConnectorV1", "vllm_ascend.kv_transfer.connector", "MooncakeConnector"
    )
    sleep_while_waiting_where_cores_are_few()
