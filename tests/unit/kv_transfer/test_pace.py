# SPDX-License-Identifier: Apache-2.0
"""A step with nothing to run rests twice as long as the last one worked, and never longer than allowed."""

import time

from vllm_ascend.kv_transfer.pace import Pace


def test_rest_is_twice_the_work():
    pace = Pace()
    before_s = time.monotonic()
    pace.rested()
    time.sleep(0.05)
    rest_s = pace.next_rest_s(longest_s=60)
    assert 0.1 <= rest_s <= 2 * (time.monotonic() - before_s)


def test_rest_has_a_longest():
    pace = Pace()
    time.sleep(0.02)
    assert pace.next_rest_s(longest_s=0.003) == 0.003


def test_work_begins_when_the_rest_is_over():
    pace = Pace()
    time.sleep(0.05)
    before_s = time.monotonic()
    pace.rested()
    assert pace.next_rest_s(longest_s=60) <= 2 * (time.monotonic() - before_s)
