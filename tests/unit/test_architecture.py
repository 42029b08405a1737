"""Imports go one way, and nothing of the machine that this was written on is in the repository."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "srl_rlvr"


def imported(path: Path, *, at_import: bool = False) -> set[str]:
    """Modules that the file imports anywhere, or only those that its own import triggers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: Iterable[ast.AST] = ast.walk(tree)
    if at_import:
        nodes = tree.body
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def offenders(files: Iterable[Path], *forbidden: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in sorted(imported(path))
        if any(name == each or name.startswith(f"{each}.") for each in forbidden)
    ]


def modules(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (PACKAGE / folder).rglob("*.py")]
    assert found
    return found


def core() -> list[Path]:
    """All but the commands and their entry point."""
    driving = {PACKAGE / "__main__.py", *(PACKAGE / "cli").rglob("*.py")}
    return [path for path in PACKAGE.rglob("*.py") if path not in driving]


def test_the_algorithm_never_imports_ray() -> None:
    algorithm = [
        PACKAGE / "pipeline.py",
        PACKAGE / "batch.py",
        *modules("stages", "policies", "engines", "model_types"),
    ]
    assert offenders(algorithm, "ray") == []


def test_only_the_commands_know_the_actors() -> None:
    assert offenders(core(), "actors", "serve") == []


def test_nothing_imports_the_commands_that_drive_it() -> None:
    assert offenders([*core(), *(ROOT / "actors").rglob("*.py")], "srl_rlvr.cli") == []


def test_policies_do_not_know_the_stages_nor_stages_the_pipeline() -> None:
    above_policies = ("srl_rlvr.stages", "srl_rlvr.pipeline", "srl_rlvr.verifiers", "srl_rlvr.config")
    assert offenders(modules("policies"), *above_policies) == []
    assert offenders(modules("stages"), "srl_rlvr.pipeline", "srl_rlvr.verifiers") == []
    assert offenders(modules("model_types"), "srl_rlvr.pipeline", "srl_rlvr.stages") == []
    assert offenders(modules("engines"), "srl_rlvr.pipeline", "srl_rlvr.stages", "srl_rlvr.verifiers") == []
    assert offenders([PACKAGE / "records.py"], "srl_rlvr.config", "srl_rlvr.policies", "torch") == []


def test_actors_are_not_imported_by_what_they_hold() -> None:
    assert offenders(modules("verifiers", "examples", "reporting", "registry"), "srl_rlvr.pipeline") == []


def test_reading_a_config_imports_neither_torch_nor_ray() -> None:
    reached, todo = set(), {"srl_rlvr.config"}
    while todo:
        name = todo.pop()
        reached.add(name)
        place = ROOT.joinpath(*name.split("."))
        path = next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)
        if path is not None:
            todo |= imported(path, at_import=True) - reached
    assert {name.partition(".")[0] for name in reached} & {"torch", "ray", "transformers", "vllm"} == set()


def test_help_imports_neither_torch_nor_ray() -> None:
    heavy = "torch", "ray", "transformers", "vllm", "mlflow"
    script = f"import sys; from srl_rlvr import cli; cli._parser(); print(*set({heavy}) & set(sys.modules))"
    asked = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert asked.stdout.split() == []


def test_every_package_is_a_room_with_a_sentence() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "actors").rglob("*.py")]:
        if path.name != "__main__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} opens without a docstring"


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_tracked_files_name_no_machine_and_no_private_registry() -> None:
    # Put together here, so that this file is not one that it finds.
    home, host = "/".join(("", "work", "")), "|".join(("artifactory", "nexus", r"pip\.conf", "10\\.\\d+\\.\\d+\\.\\d+"))
    folders = "|".join(re.escape(folder) for folder in (home, "/" + "root/", "/" + "home/", "/" + "tmp/w/"))
    pattern = re.compile(
        rf"(?<![\w.])(?:{folders})|(?:{host})|--extra-index-url|--index-url (?!https://download\.pytorch\.org|\$\(CPU_INDEX\))"
    )
    found = []
    for path in tracked_files():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []
