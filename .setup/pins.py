# SPDX-License-Identifier: Apache-2.0
"""Print pins of pyproject.toml, the only place that has them, for the installer.

`pins.py build-system` prints the build requirements, `pins.py dependencies NAME...` the named runtime pins,
`pins.py extra NAME...` the pins of optional groups; one requirement per word, ready for `pip install`.
"""

import re
import sys
import tomllib
from pathlib import Path


def main(kind: str, *names: str) -> None:
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
        document = tomllib.load(file)
    match kind:
        case "build-system":
            pins = document["build-system"]["requires"]
        case "dependencies":
            by_name = {re.split("[=<>]", pin)[0]: pin for pin in document["project"]["dependencies"]}
            pins = [by_name[name] for name in names]
        case "extra":
            pins = [pin for name in names for pin in document["project"]["optional-dependencies"][name]]
        case _:
            raise SystemExit(f"pins.py: asked for {kind!r}; give build-system, dependencies or extra")
    print(*pins)


if __name__ == "__main__":
    main(*sys.argv[1:])
