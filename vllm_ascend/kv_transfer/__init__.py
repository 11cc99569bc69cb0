# SPDX-License-Identifier: Apache-2.0
"""Moving a request's KV cache from the engine that prefills it to the engine that decodes it.

    router              prefill engine                          decode engine
      | request, max_tokens 1 |                                      |
      |  {do_remote_decode}   |                                      |
      |---------------------->| computes the prompt's KV             |
      |                       | holds its blocks under a lease       |
      |<----------------------|                                      |
      |  {do_remote_prefill, remote_block_ids, remote_engine_id, ..} |
      |------------------------------------------------------------->|
      |                       |<-- AskForEngine (once per engine) ---| who are you, where is your KV?
      |                       |--- Engine: model, sizes, regions --->| checks, plans the pair
      |                       |<-- Renew (while requests wait) ------|
      |                       |<== reads of every rank =============>| plans the request, reads, regroups
      |                       |<-- Done, from every reading rank ----|
      |                       |--- DoneNoted: the lease held ------->| the request may run
      |                       | frees the blocks                     |
      |<-------------------------------------------------------------|

A router may tell decode before prefill has computed, under a name of its choice. Then decode asks
(AskProgress) how far the request of that name is, and reads what is computed, part by part; the last part is
as above.

Each engine has two halves. `scheduler` runs beside vLLM's scheduler: it decides what to pull and when blocks
may be freed, and on the prefill side owns the one listener that peers ask. `worker` runs on every rank: it
registers the rank's cache, and on the decode side reads and regroups in threads of its own. vLLM carries
messages between the halves; `connector` is what vLLM sees of both.

What can be worked out from numbers is in pure files, to be read in this order: `topology` (which heads live
where), `blocks` (which blocks to pull), `plan` (which bytes to read), `lease` (how long blocks are held),
`messages` (what is said), `transport` (the seam to the engine that moves bytes).
"""
