# SPDX-License-Identifier: Apache-2.0
"""The arrows of docs/architecture.md, held against the code: an import that is not here is forbidden."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_ascend"

# What a module may import of this package, at import or inside a function. A folder stands for its modules.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"compat"},
    "errors": set(),
    "envs": {"errors"},
    "compat": {"errors", "envs"},
    "platform": {
        "errors",
        "envs",
        "compat",
        "worker.kernels",
        "ops",
        "kv_transfer.config",
        "attention.layout_option",
    },
    "worker": {"errors", "envs", "compat", "worker", "attention", "ops", "distributed"},
    "attention": {"errors", "envs", "attention"},
    "ops": {"errors", "envs", "ops"},
    "distributed": {"errors", "envs"},
    "distributed.mooncake_connector": {"kv_transfer.connector"},
    "emulator": {"emulator"},
    "doctor": {
        *("doctor", "errors", "envs", "kv_transfer.config", "kv_transfer.handshake", "kv_transfer.messages"),
        *("kv_transfer.mooncake", "kv_transfer.transport", "kv_transfer.trust"),
    },
    "kv_transfer.trust": {"errors", "envs"},
    "kv_transfer.door": {"errors", "kv_transfer.trust"},
    "kv_transfer.config": {"errors", "kv_transfer.trust"},
    "kv_transfer.connector": {
        *("errors", "envs", "kv_transfer.config", "kv_transfer.local", "kv_transfer.messages"),
        *("kv_transfer.decode_side", "kv_transfer.metrics", "kv_transfer.mooncake", "kv_transfer.pace"),
        *("kv_transfer.prefill_side", "kv_transfer.regroup"),
        *("kv_transfer.sums", "kv_transfer.transport", "kv_transfer.trust", "kv_transfer.worker"),
        "kv_transfer.orders",
    },
    "kv_transfer.pace": set(),
    "kv_transfer.prompts": {"kv_transfer.messages"},
    "kv_transfer.prefill_side": {
        *("kv_transfer.blocks", "kv_transfer.handshake", "kv_transfer.lease", "kv_transfer.messages"),
        *("errors", "kv_transfer.metrics", "kv_transfer.named", "kv_transfer.prompts", "kv_transfer.sums"),
        "kv_transfer.trust",
        "kv_transfer.orders",
    },
    "kv_transfer.named": {"kv_transfer.messages", "kv_transfer.prompts"},
    "kv_transfer.decode_side": {
        *("errors", "kv_transfer.blocks", "kv_transfer.early", "kv_transfer.follower", "kv_transfer.keeper"),
        *("kv_transfer.messages", "kv_transfer.metrics", "kv_transfer.sharing", "kv_transfer.trust"),
        "kv_transfer.usable",
        "kv_transfer.orders",
    },
    "kv_transfer.early": {
        *("kv_transfer.blocks", "kv_transfer.follower", "kv_transfer.growth", "kv_transfer.keeper"),
        *("kv_transfer.messages", "kv_transfer.prompts", "kv_transfer.topology", "kv_transfer.usable"),
        "kv_transfer.orders",
    },
    "kv_transfer.follower": {"errors", "kv_transfer.door", "kv_transfer.messages", "kv_transfer.trust"},
    "kv_transfer.growth": {"kv_transfer.topology"},
    "kv_transfer.usable": {
        *("kv_transfer.blocks", "kv_transfer.messages", "kv_transfer.prompts", "kv_transfer.topology"),
    },
    "kv_transfer.orders": {"kv_transfer.messages"},
    "kv_transfer.sharing": set(),
    "kv_transfer.worker": {
        *("errors", "envs", "kv_transfer.blocks", "kv_transfer.checksum", "kv_transfer.config"),
        *("kv_transfer.handshake", "kv_transfer.sums", "kv_transfer.verify"),
        *("kv_transfer.local", "kv_transfer.messages", "kv_transfer.metrics", "kv_transfer.pairing"),
        *("kv_transfer.parts", "kv_transfer.peers", "kv_transfer.reader", "kv_transfer.reading"),
        "kv_transfer.regroup",
        *("kv_transfer.topology", "kv_transfer.staged", "kv_transfer.transport", "kv_transfer.trust"),
        "kv_transfer.orders",
    },
    "kv_transfer.reading": {
        *("errors", "kv_transfer.blocks", "kv_transfer.checksum", "kv_transfer.cover", "kv_transfer.local"),
        *("kv_transfer.messages", "kv_transfer.metrics", "kv_transfer.pairing", "kv_transfer.plan"),
        *("kv_transfer.reader", "kv_transfer.regroup", "kv_transfer.staged", "kv_transfer.topology"),
        *("kv_transfer.transport", "kv_transfer.verify"),
        "kv_transfer.orders",
    },
    "kv_transfer.local": {
        *("errors", "attention.cache_layout", "attention.layout_option", "kv_transfer.blocks"),
        "kv_transfer.messages",
        *("kv_transfer.plan", "kv_transfer.topology", "kv_transfer.transport"),
    },
    "kv_transfer.pairing": {
        *("errors", "attention.cache_layout", "kv_transfer.config", "kv_transfer.local"),
        *("kv_transfer.messages", "kv_transfer.plan", "kv_transfer.topology", "kv_transfer.transport"),
    },
    "kv_transfer.checksum": {"attention.cache_layout", "kv_transfer.topology"},
    "kv_transfer.sums": {"errors", "kv_transfer.messages"},
    "kv_transfer.verify": {
        *("errors", "kv_transfer.blocks", "kv_transfer.checksum", "kv_transfer.handshake"),
        *("kv_transfer.messages", "kv_transfer.plan", "kv_transfer.topology"),
    },
    "kv_transfer.keeper": {"errors", "kv_transfer.messages", "kv_transfer.trust"},
    "kv_transfer.handshake": {
        *("errors", "envs", "kv_transfer.door", "kv_transfer.messages", "kv_transfer.trust"),
    },
    "kv_transfer.reader": {"errors", "kv_transfer.transport", "kv_transfer.turns"},
    "kv_transfer.turns": set(),
    "kv_transfer.peers": {"errors"},
    "kv_transfer.parts": set(),
    "kv_transfer.regroup": {"errors", "envs", "attention.cache_layout", "kv_transfer.topology"},
    "kv_transfer.windows": {"errors", "kv_transfer.plan", "kv_transfer.transport"},
    "kv_transfer.convert": {
        *("errors", "kv_transfer.blocks", "kv_transfer.plan", "kv_transfer.topology"),
        *("kv_transfer.transport", "kv_transfer.windows"),
    },
    "kv_transfer.converted": {
        *("attention.cache_layout", "kv_transfer.convert", "kv_transfer.place", "kv_transfer.staging"),
        *("kv_transfer.transport", "kv_transfer.windows"),
    },
    "kv_transfer.staged": {
        *("errors", "kv_transfer.blocks", "kv_transfer.config", "kv_transfer.convert"),
        *("kv_transfer.converted", "kv_transfer.place", "kv_transfer.plan"),
        *("kv_transfer.reader", "kv_transfer.staging", "kv_transfer.transport", "kv_transfer.windows"),
    },
    "kv_transfer.staging": {"errors", "kv_transfer.place", "kv_transfer.transport", "kv_transfer.windows"},
    "kv_transfer.place": {"errors", "attention.cache_layout", "kv_transfer.place_kernel"},
    "kv_transfer.place_kernel": set(),
    "kv_transfer.mooncake": {"errors", "envs", "kv_transfer.transport"},
    "kv_transfer.plan": {
        *("errors", "attention.cache_layout", "kv_transfer.blocks"),
        *("kv_transfer.topology", "kv_transfer.transport"),
    },
    "kv_transfer.cover": {
        *("errors", "attention.cache_layout", "kv_transfer.blocks", "kv_transfer.plan"),
        "kv_transfer.transport",
    },
    "kv_transfer.blocks": {"errors", "kv_transfer.topology"},
    "kv_transfer": {"errors"},
}

# Outside libraries that only some files may import.
PURE = {
    *("errors", "kv_transfer.blocks", "kv_transfer.cover", "kv_transfer.growth", "kv_transfer.lease"),
    *("kv_transfer.messages", "kv_transfer.orders", "kv_transfer.plan", "kv_transfer.sharing"),
    *("kv_transfer.convert", "kv_transfer.topology", "kv_transfer.transport"),
    *("kv_transfer.turns", "kv_transfer.windows"),
}
WITHOUT_TORCH_AND_VLLM = PURE | {
    *("kv_transfer.door", "kv_transfer.follower", "kv_transfer.handshake", "kv_transfer.parts"),
    *("kv_transfer.peers", "kv_transfer.reader", "kv_transfer.trust"),
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), path


MODULES = [pytest.param(name, path, id=name) for name, path in modules()]


def imports_of(path: Path) -> set[str]:
    """Dotted names that the file imports; those under TYPE_CHECKING are types only and do not count."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead; import from the package"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))
    return found


def allowed(name: str) -> set[str]:
    """The entry of the module, or of its nearest folder that has one."""
    while name not in MAY_IMPORT:
        name, _, _ = name.rpartition(".")
        assert name, "a new module: give it its arrows in MAY_IMPORT and in docs/architecture.md"
    return MAY_IMPORT[name]


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_imports_within_the_package_follow_the_arrows(name: str, path: Path):
    inside = {
        full.removeprefix("vllm_ascend.") for full in imports_of(path) if full.startswith("vllm_ascend.")
    }
    permitted = allowed(name)
    forbidden = {
        full for full in inside if not any(full == one or full.startswith(f"{one}.") for one in permitted)
    }
    assert not forbidden, f"{name} imports {sorted(forbidden)}; it may import {sorted(permitted)}"


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_outside_libraries_stay_where_they_belong(name: str, path: Path):
    libraries = {full.split(".")[0] for full in imports_of(path)}
    assert "mooncake" not in libraries or name == "kv_transfer.mooncake"
    assert "triton" not in libraries or name == "kv_transfer.place_kernel"
    if name in WITHOUT_TORCH_AND_VLLM:
        assert not libraries & {"torch", "torch_npu", "vllm"}


def test_nothing_but_the_emulator_knows_that_the_device_is_emulated():
    knowing = [
        name
        for name, path in modules()
        # The doctor names the launcher where there is no CANN, and tells nothing apart by it.
        if not name.startswith("emulator")
        and name != "doctor.machine"
        and "emulator" in path.read_text().lower()
    ]
    assert knowing == []


def test_every_file_begins_with_its_licence():
    sources = [
        path
        for pattern in ("*.py", "*.cpp", "*.h", "*.sh")
        for folder in ("vllm_ascend", "csrc", "tests", "examples")
        for path in (ROOT / folder).rglob(pattern)
    ]
    without = [
        str(path.relative_to(ROOT))
        for path in sources
        if "SPDX-License-Identifier: Apache-2.0" not in "\n".join(path.read_text().splitlines()[:2])
    ]
    assert sources
    assert without == []
