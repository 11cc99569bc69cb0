# SPDX-License-Identifier: Apache-2.0
"""Attention on paged KV: the backends, and the layout of the cache they share with the connector."""
