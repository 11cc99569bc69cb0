# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_ascend.doctor`: what is wrong here, and what to do about it.

Looks at what an engine needs, in the order in which it needs it: versions, the CANN runtime, the device,
the environment, ports, the transfer engine with the libraries that it links, registered memory; and with
--peer at a prefill engine: its listener, and a real transfer from each of its ranks.

Every finding is a line with what was found; one that is wrong has a second line with its cure. The output is
what to paste into a bug report: it names no secret.
"""
