# SPDX-License-Identifier: Apache-2.0
"""A peer is asked once, however many want it, and nobody waits in a thread."""

from __future__ import annotations

from vllm_ascend.errors import KVTransferError, PeerUnreachable
from vllm_ascend.kv_transfer.peers import Peers


def test_many_who_want_a_peer_get_one_answer():
    peers: Peers[str] = Peers()
    told: list[object] = []
    asked: list[str] = []

    def ask() -> str:
        asked.append("who are you")
        # Somebody comes while the peer is being asked.
        assert not peers.when_met("p", told.append)
        return "a prefill engine"

    assert [peers.when_met("p", told.append) for _ in range(3)] == [True, False, False]
    assert told == []
    peers.meet("p", ask)
    assert told == ["a prefill engine"] * 4
    assert not peers.when_met("p", told.append)
    assert told == ["a prefill engine"] * 5
    assert asked == ["who are you"]


def test_a_peer_that_cannot_be_met_is_asked_again_by_the_next_and_holds_up_no_other():
    peers: Peers[str] = Peers()
    told: dict[str, list[str | KVTransferError]] = {"silent": [], "lively": []}

    def silent() -> str:
        raise PeerUnreachable("it does not answer")

    assert peers.when_met("silent", told["silent"].append)
    assert not peers.when_met("silent", told["silent"].append)
    assert peers.when_met("lively", told["lively"].append)
    peers.meet("lively", lambda: "lively")
    assert (told["silent"], told["lively"]) == ([], ["lively"])
    peers.meet("silent", silent)
    assert [str(error) for error in told["silent"]] == ["it does not answer"] * 2
    assert peers.when_met("silent", told["silent"].append)
