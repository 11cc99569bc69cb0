# SPDX-License-Identifier: Apache-2.0
"""Bars as an SVG file, drawn without a library: one group per case, one bar per way, a line for each goal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2")

_LEFT, _RIGHT, _TOP, _BOTTOM = 190, 60, 64, 30
_WIDTH = 760
_BAR, _BAR_GAP, _GROUP_GAP = 12, 2, 10


@dataclass(frozen=True)
class Chart:
    """Horizontal bars: `groups` maps each case to the values of `series`, in their order."""

    title: str
    unit: str
    """What a value counts, such as "times one copy of the same bytes"."""
    series: Sequence[str]
    groups: Mapping[str, Sequence[float]]
    goals: Mapping[str, float]
    """Lines across all bars, by name."""
    longest: float = float("inf")
    """Bars end here, with an arrow behind the value if it goes on."""

    def save(self, path: Path) -> None:
        path.write_text("\n".join(["<!-- SPDX-License-Identifier: Apache-2.0 -->", *self._elements(), ""]))

    def _elements(self) -> list[str]:
        group_height = len(self.series) * (_BAR + _BAR_GAP) + _GROUP_GAP
        bottom = _TOP + len(self.groups) * group_height
        largest = min(self.longest, max(max(map(max, self.groups.values())), *self.goals.values()))
        per_unit = (_WIDTH - _LEFT - _RIGHT) / largest
        size = f'width="{_WIDTH}" height="{bottom + _BOTTOM}"'
        drawn = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
            f'<rect {size} fill="#ffffff"/>',
            _text(12, 20, self.title, size=14),
            *self._legend(),
        ]
        for number, (case, values) in enumerate(self.groups.items()):
            top = _TOP + number * group_height
            middle = top + (group_height - _GROUP_GAP) / 2 + 4
            drawn.append(_text(_LEFT - 8, middle, case, anchor="end"))
            for bar, value in enumerate(values):
                y, width = top + bar * (_BAR + _BAR_GAP), min(value, largest) * per_unit
                label = f"{value:.2f}" if value <= largest else f"{value:.0f} \N{RIGHTWARDS ARROW}"
                drawn.append(
                    f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{COLOURS[bar]}"/>'
                )
                drawn.append(_text(_LEFT + width + 4, y + _BAR - 2, label))
        for name, goal in self.goals.items():
            x = _LEFT + goal * per_unit
            drawn.append(
                f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="#d62728" '
                f'stroke-dasharray="4 3"/>'
            )
            drawn.append(_text(x, bottom + 12, f"{name}: {goal:g}", anchor="middle"))
        return [*drawn, _text(_WIDTH - 12, bottom + 24, self.unit, anchor="end"), "</svg>"]

    def _legend(self) -> list[str]:
        drawn, x = [], _LEFT
        for name, colour in zip(self.series, COLOURS, strict=False):
            drawn.append(f'<rect x="{x}" y="34" width="10" height="10" fill="{colour}"/>')
            drawn.append(_text(x + 14, 43, name))
            x += 30 + 6 * len(name)
        return drawn


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
