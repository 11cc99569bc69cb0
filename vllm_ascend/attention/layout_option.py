# SPDX-License-Identifier: Apache-2.0
"""The option `kv_cache_layout`: how an engine lays out its KV cache (cache_layout.py).

    --additional-config '{"kv_cache_layout": "head_major"}'

vLLM knows the two under names of its own and allocates accordingly: LBHNC and BHLNC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_ascend.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OPTION = "kv_cache_layout"

TOKEN_MAJOR, HEAD_MAJOR = KVCacheLayout.LBHNC, KVCacheLayout.BHLNC
_LAYOUTS = {"token_major": TOKEN_MAJOR, "head_major": HEAD_MAJOR}


def choose_layout(vllm_config: VllmConfig) -> None:
    """Let vLLM use the layout that the option names, if it does. Raises ConfigError for another value."""
    options = vllm_config.additional_config
    if not isinstance(options, dict) or OPTION not in options:
        return
    name = options[OPTION]
    if name not in _LAYOUTS:
        raise ConfigError(f"{OPTION} must be one of {', '.join(_LAYOUTS)}, got {name!r} in additional_config")
    from vllm import envs

    layout = _LAYOUTS[name].name
    if envs.VLLM_KV_CACHE_LAYOUT not in (None, layout):
        raise ConfigError(
            f"additional_config asks for {OPTION} {name}, which is vLLM's {layout}, and VLLM_KV_CACHE_LAYOUT "
            f"for {envs.VLLM_KV_CACHE_LAYOUT}; unset one"
        )
    vllm_config.cache_config.kv_cache_layout = layout


def is_head_major(vllm_config: VllmConfig) -> bool:
    """Whether the engine's cache is head-major. To be asked once vLLM has resolved the layout."""
    return vllm_config.cache_config.get_resolved_kv_cache_layout() is HEAD_MAJOR
