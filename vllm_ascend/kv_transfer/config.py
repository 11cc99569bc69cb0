# SPDX-License-Identifier: Apache-2.0
"""The connector's own options, as `kv_connector_extra_config` gives them, checked once at start.

Every accepted key has a meaning; any other is refused by name. docs/kv_transfer.md holds the table.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_ascend.errors import ConfigError
from vllm_ascend.kv_transfer.trust import Network, shared_secret

NAME = "MooncakeConnectorV1"
"""What `kv_connector` says to get this connector."""
CUTS_PAGES_BY_HEADS = ("MooncakeConnector", "NixlConnector")
"""vLLM's connectors that hand over parts of pages."""

PROTOCOLS = ("tcp", "rdma", "ascend")
"""What Mooncake's engine can be asked for. `ascend` needs its build for Ascend cards."""

REGROUPS = ("operators", "staged", "triton")
"""In place, by three operators; from staging memory, by one; the same by a kernel for triton-ascend."""


@dataclass(frozen=True)
class Sizes:
    """What a deployment says about one side, such as {"tp_size": 8, "dp_size": 2}. None: not said."""

    tp_size: int | None = None
    dp_size: int | None = None
    pp_size: int | None = None


@dataclass(frozen=True)
class Options:
    """All options with their defaults."""

    protocol: str | None = None
    """Protocol of the transfer engine; None: `ascend` with Mooncake's build for cards, else `tcp`."""
    host: str | None = None
    """Address that the listener binds and peers are told; None: VLLM_HOST_IP if set, else 127.0.0.1."""
    lease_s: float = 30.0
    """Prefill: how long a finished request's blocks wait for a sign of the decode engine. Decode: how long a
    request waits for the prefill engine to hear of its name."""
    reader_threads: int = 4
    """Decode: how many requests a rank reads at the same time; half of them at most from one peer."""
    peer_timeout_s: float = 5.0
    """Decode: how long to wait for a prefill engine's answer."""
    read_timeout_s: float = 10.0
    """Decode: how long a read may go on without progress."""
    verify: bool = False
    """Check every load against checksums of what prefill computed; must be set on both sides."""
    peer_networks: tuple[Network, ...] = ()
    """Where peers may be, on either side; none listed: anywhere."""
    regroup: str = "operators"
    """Decode: how heads of several sources get side by side, one of REGROUPS."""
    staging_mib: int = 128
    """Decode: device memory that pieces are read into first, once something needs it."""
    prefill: Sizes = Sizes()
    decode: Sizes = Sizes()

    @property
    def uses_staging(self) -> bool:
        """Whether heads get side by side by way of staging memory."""
        return self.regroup != "operators"


def parse_options(extra: Mapping[str, Any]) -> Options:  # Any: vLLM hands over parsed JSON
    """The options in `kv_connector_extra_config`. Raises ConfigError naming what cannot be honoured."""
    known = {
        "protocol": _protocol,
        "host": _host,
        "lease_s": _positive_seconds,
        "reader_threads": _thread_count,
        "peer_timeout_s": _positive_seconds,
        "read_timeout_s": _positive_seconds,
        "verify": _flag,
        "peer_networks": _networks,
        "regroup": _regroup,
        "staging_mib": _mebibytes,
        "prefill": _sizes,
        "decode": _sizes,
    }
    values: dict[str, Any] = {}
    for key, value in extra.items():
        if key == "use_ascend_direct":
            continue
        if key not in known:
            raise ConfigError(
                f"kv_connector_extra_config has {key!r}, which MooncakeConnectorV1 does not know; "
                f"remove it, or use one of: {', '.join([*known, 'use_ascend_direct'])}"
            )
        values[key] = known[key](key, value)
    return Options(**_with_ascend_direct(values, extra.get("use_ascend_direct", False)))


def check_start(vllm_config: VllmConfig) -> None:
    """For vLLM's platform hook: refuse a configuration before any process of the engine starts.

    Raises ConfigError as `options_of` does, and for connectors that would hand over wrong KV. Others than
    these and ours are none of its business.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return
    if transfer.kv_connector in CUTS_PAGES_BY_HEADS:
        raise ConfigError(
            f"kv_connector {transfer.kv_connector!r} cuts a page where a head of it ends, and in a page here "
            f"a token's heads lie side by side: engines of different tensor-parallel sizes would decode "
            f"wrong KV; set kv_connector to {NAME!r}"
        )
    if transfer.kv_connector == NAME or (transfer.kv_connector_module_path or "").startswith("vllm_ascend."):
        _refuse_pooling(vllm_config)
        options_of(vllm_config)


def _refuse_pooling(vllm_config: VllmConfig) -> None:
    model = vllm_config.model_config
    if model is not None and model.runner_type == "pooling":
        raise ConfigError(
            f"MooncakeConnectorV1 moves KV from prefill to decode and {model.model} embeds or classifies, "
            f"which ends with prefill; serve it without --kv-transfer-config"
        )


def options_of(vllm_config: VllmConfig) -> Options:
    """The options of an engine, checked against what the engine is.

    Raises ConfigError, naming it, for what cannot be honoured or is not carried to another engine yet.
    """
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    shared_secret()
    options = parse_options(transfer.kv_connector_extra_config)
    parallel = vllm_config.parallel_config
    for name, size in (
        ("decode_context_parallel_size", parallel.decode_context_parallel_size),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            raise ConfigError(f"MooncakeConnectorV1 does not support {name} = {size} yet; set it to 1")
    if transfer.enable_permute_local_kv:
        raise ConfigError("MooncakeConnectorV1 needs no enable_permute_local_kv; remove it")
    found = Sizes(
        tp_size=parallel.tensor_parallel_size,
        dp_size=parallel.data_parallel_size,
        pp_size=parallel.pipeline_parallel_size,
    )
    # An engine that is both may be either side of a pair, so only its peers can tell.
    sides = {"kv_producer": ("prefill", options.prefill), "kv_consumer": ("decode", options.decode)}
    side, said = sides.get(str(transfer.kv_role), ("", Sizes()))
    if complaint := check_sizes(said, found, side):
        raise ConfigError(complaint)
    return options


def check_cache(kv_cache_config: KVCacheConfig) -> None:
    """Raise ConfigError, naming it, for a KV cache that this release does not move."""
    block_sizes = set()
    for group in kv_cache_config.kv_cache_groups:
        # Layers of one group that differ in shape have a specification each.
        of_layers = getattr(group.kv_cache_spec, "kv_cache_specs", {"every layer": group.kv_cache_spec})
        # Recurrent state moves whole, whatever its shapes, types and blocks.
        attention = [spec for spec in of_layers.values() if type(spec).__name__ != "MambaSpec"]
        for spec in attention:
            _check_layer(spec)
            block_sizes.add(spec.block_size)
    if len(block_sizes) > 1:
        raise ConfigError(
            f"MooncakeConnectorV1 moves KV cache groups of one block size and this model's have "
            f"{sorted(block_sizes)} tokens, which it does not support yet; serve it without "
            f"--kv-transfer-config"
        )


def _check_layer(spec: Any) -> None:  # Any: its class is known only after the check below
    kind = type(spec).__name__
    if kind not in ("FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec"):
        raise ConfigError(
            f"MooncakeConnectorV1 moves multi-head, grouped-query and latent attention and recurrent state "
            f"and this model's KV cache is {kind}, which it does not support yet; serve it without "
            f"--kv-transfer-config"
        )
    if spec.kv_quant_mode.name != "NONE":
        raise ConfigError(
            f"MooncakeConnectorV1 does not support the quantised KV cache {spec.kv_quant_mode.name} yet; "
            f"set --kv-cache-dtype auto"
        )
    if spec.tokens_per_state != 1:
        raise ConfigError(
            f"MooncakeConnectorV1 moves a row per token and this model's KV cache has one for "
            f"{spec.tokens_per_state} tokens, which it does not support yet; serve it without "
            f"--kv-transfer-config"
        )


def check_sizes(said: Sizes, found: Sizes, side: str) -> str | None:
    """A sentence on how the configured sizes of `side` differ from the real ones, or None.

    An engine whose data-parallel ranks do not compute together knows of no other: `found` is 1 then, and
    tells nothing.
    """
    for name, said_size, found_size in (
        ("tp_size", said.tp_size, found.tp_size),
        ("dp_size", said.dp_size if found.dp_size != 1 else None, found.dp_size),
        ("pp_size", said.pp_size, found.pp_size),
    ):
        if said_size is not None and said_size != found_size:
            return (
                f"kv_connector_extra_config says {side}.{name} is {said_size}, but that engine runs with "
                f"{found_size}; correct it, or leave {side!r} out: sizes are learned from the peer"
            )
    return None


def _with_ascend_direct(values: dict[str, Any], wanted: Any) -> dict[str, Any]:
    # Deployments of vllm-ascend ask so for what Mooncake calls the protocol `ascend`.
    if not isinstance(wanted, bool):
        raise ConfigError(f"use_ascend_direct must be true or false, got {wanted!r}")
    if wanted and values.get("protocol", "ascend") != "ascend":
        raise ConfigError(
            f"use_ascend_direct asks for protocol 'ascend' and protocol is {values['protocol']!r}; remove one"
        )
    return {**values, "protocol": "ascend"} if wanted else values


def _protocol(key: str, value: Any) -> str:
    if value not in PROTOCOLS:
        raise ConfigError(f"{key} must be one of {', '.join(PROTOCOLS)}, got {value!r}")
    return str(value)


def _regroup(key: str, value: Any) -> str:
    if value not in REGROUPS:
        raise ConfigError(f"{key} must be one of {', '.join(REGROUPS)}, got {value!r}")
    return str(value)


def _mebibytes(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65536:
        raise ConfigError(f"{key} must be an integer of MiB from 1 to 65536, got {value!r}")
    return value


def _host(key: str, value: Any) -> str:
    # Peers are told it, so it must be an address and not a wildcard.
    if not isinstance(value, str) or value in ("", "*", "0.0.0.0", "::"):
        raise ConfigError(f'{key} must be an address of this machine, such as "10.0.0.5", got {value!r}')
    return value


def _positive_seconds(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 86400:
        raise ConfigError(f"{key} must be a number of seconds above 0 and below a day, got {value!r}")
    return float(value)


def _thread_count(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 64:
        raise ConfigError(f"{key} must be an integer from 1 to 64, got {value!r}")
    return value


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, got {value!r}")
    return value


def _networks(key: str, value: Any) -> tuple[Network, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ConfigError(f'{key} must be a list of networks, such as ["10.0.0.0/24"], got {value!r}')
    try:
        return tuple(ipaddress.ip_network(text) for text in value)
    except ValueError as error:
        raise ConfigError(f'{key} must list networks, such as "10.0.0.0/24": {error}') from error


def _sizes(key: str, value: Any) -> Sizes:
    if not isinstance(value, Mapping) or not set(value) <= {"tp_size", "dp_size", "pp_size"}:
        raise ConfigError(f'{key} must be like {{"tp_size": 2, "dp_size": 1}}, got {value!r}')
    for name, size in value.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"{key}.{name} must be a positive integer, got {size!r}")
    return Sizes(**value)
