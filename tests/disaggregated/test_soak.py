# SPDX-License-Identifier: Apache-2.0
"""A little of soak.py, on engines that other tests have used."""

from disaggregated.footprints import Footprint
from disaggregated.pair import Pair
from disaggregated.soak import KINDS, Engines, Plan, soak


def test_sixty_requests_of_every_kind(pair: Pair):
    engines = Engines(pair.prefill, pair.decode, pair.front, pair.num_blocks)
    # So few requests do not bring every buffer to its size.
    may_grow = Footprint(memory_mib=300, descriptors=30, threads=10)
    plan = Plan(requests=40, warm_up=20, seed=2, at_once=4, longest_prompt=400)
    verdict = soak(engines, plan, tell=print, may_grow=may_grow)
    assert verdict.good, str(verdict)
    assert verdict.kinds.keys() == {kind.__name__ for kind in KINDS}
    assert sum(verdict.outcomes.values()) == 60
