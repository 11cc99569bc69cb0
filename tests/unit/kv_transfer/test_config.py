# SPDX-License-Identifier: Apache-2.0
"""kv_connector_extra_config: what is accepted, what it becomes, what is refused by name."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
)

from vllm_ascend.errors import ConfigError
from vllm_ascend.kv_transfer.config import Options, Sizes, check_cache, check_sizes, parse_options

SHAPE: dict[str, Any] = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
FULL = FullAttentionSpec(block_size=128, **SHAPE)
WINDOWED = SlidingWindowSpec(block_size=128, sliding_window=512, **SHAPE)
STATE = MambaSpec(block_size=4096, shapes=((4, 4),), dtypes=(torch.bfloat16,))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        pytest.param({}, Options(), id="nothing said: the defaults"),
        pytest.param(
            {"prefill": {"dp_size": 2, "tp_size": 8}, "decode": {"dp_size": 4, "tp_size": 4, "pp_size": 1}},
            Options(prefill=Sizes(tp_size=8, dp_size=2), decode=Sizes(tp_size=4, dp_size=4, pp_size=1)),
            id="sizes as vllm-ascend's deployments give them",
        ),
        pytest.param(
            {"use_ascend_direct": True}, Options(protocol="ascend"), id="ascend direct is a protocol"
        ),
        pytest.param({"use_ascend_direct": False}, Options(), id="no ascend direct says nothing"),
        pytest.param(
            {"peer_networks": ["10.0.0.0/8", "fd00::/8"]},
            Options(peer_networks=(IPv4Network("10.0.0.0/8"), IPv6Network("fd00::/8"))),
            id="networks of both families",
        ),
        pytest.param(
            {"regroup": "staged", "staging_mib": 256},
            Options(regroup="staged", staging_mib=256),
            id="a regroup from staging memory",
        ),
        pytest.param(
            {
                "lease_s": 5,
                "reader_threads": 4,
                "peer_timeout_s": 0.5,
                "read_timeout_s": 2,
                "protocol": "rdma",
                "host": "10.0.0.1",
            },
            Options(
                protocol="rdma",
                host="10.0.0.1",
                lease_s=5.0,
                reader_threads=4,
                peer_timeout_s=0.5,
                read_timeout_s=2.0,
            ),
            id="every option",
        ),
    ],
)
def test_accepted(extra, expected):
    assert parse_options(extra) == expected


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        pytest.param(
            {"protocoll": "tcp"}, "has 'protocoll', which MooncakeConnectorV1 does not know", id="typo"
        ),
        pytest.param(
            {"protocol": "smoke"}, "protocol must be one of tcp, rdma, ascend", id="unknown protocol"
        ),
        pytest.param({"lease_s": 0}, "lease_s must be a number of seconds above 0", id="no lease at all"),
        pytest.param({"lease_s": "30"}, "lease_s must be a number of seconds", id="seconds as text"),
        pytest.param({"lease_s": True}, "lease_s must be a number of seconds", id="seconds as a flag"),
        pytest.param({"reader_threads": 0}, "reader_threads must be an integer from 1 to 64", id="no reader"),
        pytest.param({"peer_networks": "10.0.0.0/8"}, "must be a list of networks", id="one network"),
        pytest.param({"verify": "yes"}, "verify must be true or false, got 'yes'", id="no yes for true"),
        pytest.param({"peer_networks": []}, "must be a list of networks", id="no network at all"),
        pytest.param({"peer_networks": ["10.0.0.5/8"]}, "has host bits set", id="a network with a host"),
        pytest.param(
            {"regroup": "fast"}, "regroup must be one of operators, staged, triton", id="unknown regroup"
        ),
        pytest.param({"staging_mib": 0}, "staging_mib must be an integer of MiB from 1", id="no memory"),
        pytest.param({"host": 5}, "host must be an address", id="host as a number"),
        pytest.param({"prefill": 8}, "prefill must be like", id="sizes as a number"),
        pytest.param({"prefill": {"ep_size": 2}}, "prefill must be like", id="a size that nobody checks"),
        pytest.param({"decode": {"tp_size": 0}}, r"decode\.tp_size must be a positive integer", id="size 0"),
        pytest.param(
            {"use_ascend_direct": True, "protocol": "tcp"},
            "use_ascend_direct asks for protocol 'ascend' and protocol is 'tcp'",
            id="two protocols",
        ),
        pytest.param(
            {"use_ascend_direct": "yes"}, "use_ascend_direct must be true or false", id="a flag as text"
        ),
    ],
)
def test_refused(extra, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(extra)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        pytest.param(Sizes(), None, id="nothing said"),
        pytest.param(Sizes(tp_size=4, dp_size=2), None, id="right"),
        pytest.param(
            Sizes(tp_size=8),
            "kv_connector_extra_config says prefill.tp_size is 8, but that engine runs with 4; correct it, "
            "or leave 'prefill' out: sizes are learned from the peer",
            id="wrong",
        ),
        pytest.param(
            Sizes(dp_size=4),
            "kv_connector_extra_config says prefill.dp_size is 4, but that engine runs with 2; correct it, "
            "or leave 'prefill' out: sizes are learned from the peer",
            id="other data-parallel ranks",
        ),
    ],
)
def test_sizes_that_were_configured_are_checked(said, complaint):
    assert check_sizes(said, Sizes(tp_size=4, dp_size=2), "prefill") == complaint


def test_a_data_parallel_rank_that_knows_of_no_others_says_nothing_of_their_number():
    assert check_sizes(Sizes(tp_size=4, dp_size=8), Sizes(tp_size=4, dp_size=1), "prefill") is None


def cache_of(*specs: KVCacheSpec) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layers.{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)


@pytest.mark.parametrize("specs", [(FULL,), (WINDOWED,), (FULL, WINDOWED, WINDOWED), (STATE,), (FULL, STATE)])
def test_groups_of_attention_and_of_state_are_moved(specs):
    check_cache(cache_of(*specs))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        pytest.param(
            SlidingWindowMLASpec(block_size=128, sliding_window=512, **SHAPE),
            "this model's KV cache is SlidingWindowMLASpec",
            id="latent attention",
        ),
        pytest.param(
            SlidingWindowSpec(block_size=64, sliding_window=512, **SHAPE),
            r"of one block size and this model's have \[64, 128\] tokens",
            id="two block sizes",
        ),
    ],
)
def test_other_groups_are_refused_by_name_beside_full_attention(spec, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_cache(cache_of(FULL, spec))
