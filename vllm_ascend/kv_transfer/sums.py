# SPDX-License-Identifier: Apache-2.0
"""Checksums on the prefill side: ranks report them once a request is finished, peers ask while it is held.

Two threads meet here, as in `lease`: the engine's adds and drops, the listener's looks up.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_ascend.kv_transfer.messages import AskSums, Refused, Sums, SumsPending


@dataclass(frozen=True)
class LayerSums:
    """What one rank found in one layer of a request."""

    rank: int
    """Its place in `Engine.ranks`."""
    layer: str
    first_unit: int
    """0, but in a layer with a sliding window."""
    sums: npt.NDArray[np.uint64]
    """[heads, units]."""


@dataclass
class _Request:
    tokens: int
    layers: dict[tuple[int, str], LayerSums] = field(default_factory=dict)


class SumTable:
    """The checksums of the requests that a prefill engine holds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[str, _Request] = {}

    def expect(self, request_id: str, tokens: int) -> None:
        """Ranks are about to sum `tokens` of this request."""
        with self._lock:
            self._requests[request_id] = _Request(tokens)

    def add(self, request_id: str, found: Iterable[LayerSums]) -> None:
        """What ranks report. Of a request that is no longer held it is dropped."""
        with self._lock:
            request = self._requests.get(request_id)
            if request is not None:
                request.layers.update(((one.rank, one.layer), one) for one in found)

    def drop(self, request_ids: Iterable[str]) -> None:
        """These are no longer held."""
        with self._lock:
            for request_id in request_ids:
                self._requests.pop(request_id, None)

    def answer(self, question: AskSums) -> Sums | SumsPending | Refused:
        """What is known of the question's layer."""
        with self._lock:
            request = self._requests.get(question.request_id)
            if request is None:
                return Refused(reason=f"it does not hold request {question.request_id} any more")
            found = request.layers.get((question.rank, question.layer))
        if found is None:
            return SumsPending()
        first = question.first_unit - found.first_unit
        if first < 0 or first + question.num_units > found.sums.shape[1]:
            return Refused(
                reason=f"it has sums of units {found.first_unit} to "
                f"{found.first_unit + found.sums.shape[1] - 1} and was asked for {question.num_units} from "
                f"{question.first_unit} on"
            )
        part = found.sums[:, first : first + question.num_units]
        return Sums(sums=part.astype("<u8").tobytes(), tokens=request.tokens)
