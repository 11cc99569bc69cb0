# SPDX-License-Identifier: Apache-2.0
"""Collectives between the processes of one engine."""
