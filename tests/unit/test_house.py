"""The house keeps its shape: budgets of lines and files, a page for every room, names in texts that lead somewhere.

A budget is a number of today. It may fall; raise it only in the commit that says why. Floors (who may import whom) are
contracts of import-linter in pyproject.toml, checked by `make lint`.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from mutations import MUTATIONS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tatar_dist"

# From a prompt to a pushed weight: what somebody reads who wants to know how a step works.
CORE = """
grpo sft sampling trainer types
rewards/thurstone rewards/pairwise rewards/links rewards/terms rewards/batch rewards/score
algo/loss algo/advantages algo/aggregation algo/schedule
learner/actor learner/group learner/batch learner/sharding learner/packing learner/zero3 learner/policy
learner/shared_prefix learner/ragged
rollout/pool rollout/calls rollout/engine rollout/options
sync/push sync/object_store sync/nccl sync/cuda_ipc sync/vllm_backend
cluster/ray_cluster cluster/reward
faults/health faults/waiting
""".split()
CORE_LINES, CORE_FILES = 5_800, 40
PACKAGE_LINES = 33_130
ROOT_MODULES = 10
FILE_LINES = 400
README_BYTES = 12_288
FOREIGN_WRITES = 9  # attributes of other objects that the files of the loop set


def tracked() -> list[Path]:
    """The files that git knows; all of them where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        tops = ("tatar_dist", "tests", "configs", "launch", "slurm", ".ci")
        found = [*ROOT.glob("*"), *(path for top in tops for path in (ROOT / top).rglob("*"))]
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


def sources() -> list[Path]:
    """The package's Python files."""
    return [path for path in tracked() if path.suffix == ".py" and path.is_relative_to(PACKAGE)]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.xdist_group("house")
def test_tests_that_share_what_they_start_stay_in_one_process(request):
    # pytest 9.2 ignores how xdist 3.8 names groups, without a word
    assert "PYTEST_XDIST_WORKER" not in os.environ or request.node.nodeid.endswith("@house")


def test_docstrings_begin_with_a_short_line():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [
        (path, node) for path in sources() for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)
    ]
    first = [(path, (ast.get_docstring(node) or " ").splitlines()[0]) for path, node in nodes]
    assert [f"{path}: {line}" for path, line in first if len(line) > 90] == []


def test_the_reading_core_stays_small():
    core = [PACKAGE / f"{name}.py" for name in CORE]
    assert len(core) <= CORE_FILES
    assert sum(map(lines, core)) <= CORE_LINES


def test_the_package_stays_small():
    largest = sorted(sources(), key=lines)[-3:]
    assert sum(map(lines, sources())) <= PACKAGE_LINES, f"the largest files are {[p.name for p in largest]}"
    assert all(lines(path) <= FILE_LINES for path in largest), largest


def test_the_root_of_the_package_has_few_modules():
    assert len(list(PACKAGE.glob("*.py"))) <= ROOT_MODULES


def test_a_class_name_stands_for_one_thing():
    trees = [ast.parse(path.read_text()).body for path in sources()]
    names = Counter(node.name for body in trees for node in body if isinstance(node, ast.ClassDef))
    assert [name for name, n in names.items() if n > 1] == ["Backbone"]  # a model family has one, by that name


def test_the_readme_is_a_front_door():
    assert (ROOT / "README.md").stat().st_size <= README_BYTES


def test_no_file_has_a_name_that_says_nothing():
    empty = {"utils", "util", "helpers", "helper", "misc", "common", "manager"}
    assert not [path for path in sources() if path.stem in empty]


def rooms() -> list[Path]:
    return sorted({path.parent for path in sources() if path.parent != PACKAGE})


@pytest.mark.parametrize("room", rooms(), ids=lambda room: str(room.relative_to(PACKAGE)))
def test_every_room_has_a_page_that_names_its_files(room):
    texts = [(ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or "")]
    if (room / "README.md").exists():
        texts.append((room / "README.md").read_text())
    page = "\n".join(texts)
    unnamed = [p.name for p in sorted(room.glob("*.py")) if p.stem != "__init__" and p.name not in page]
    assert page.strip() and not unnamed, f"{room.name}: README.md or the docstring of __init__.py must name {unnamed}"


NOT_MODULES = ("manifest", "egg", "x", "__file__")  # the stamp of a manifest, build products, an invented name
PAGES = sorted(
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PACKAGE.rglob("README.md"), *ROOT.glob("*/README.md"))
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_exists(page):
    text = page.read_text()
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    absent = [target for target in links if target and not (page.parent / target).exists()]
    named = re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|sh|toml|md|svg|png|txt))`", text)
    places, everywhere = (page.parent, ROOT, PACKAGE, *page.parents), {path.name for path in tracked()}
    absent += [n for n in named if n not in everywhere and not any((p / n).exists() for p in places)]
    assert not absent, f"{page.relative_to(ROOT)} names what does not exist: {absent}"


def test_every_file_of_the_package_that_a_text_names_exists():
    absent = set()
    for path in tracked():
        if path.suffix in (".py", ".sh", ".md", ".yaml", ".toml", ".txt", ".j2", "") and path != Path(__file__):
            for name in re.findall(
                r"(?<![\w./-])tatar_dist/[\w/-]+\.(?:py|yaml|j2|md)\b", path.read_text(errors="ignore")
            ):
                absent |= {f"{path.relative_to(ROOT)}: {name}"} if not (ROOT / name).exists() else set()
    assert not absent


@cache
def names_of(file: Path) -> set[str]:
    """What a module binds at its top level."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:n])
        init = path / "__init__.py"
        file = init if init.exists() else path.with_suffix(".py")
        if file.exists():
            return n == len(parts) or parts[n] in names_of(file)
    return False


def test_every_module_that_a_text_names_exists():
    """Strings that name modules (engines, servers, program texts in tests) fail only when they run."""
    absent = set()
    for path in tracked():
        if path.suffix not in (".py", ".sh", ".md", ".yaml", ".toml", ".txt", ".j2", "") or path == Path(__file__):
            continue
        text = path.read_text(errors="ignore")
        names = re.findall(r"(?<![\w./-])tatar_dist(?:\.[a-z_0-9]+)+", text)
        for module, imported in re.findall(r"from (tatar_dist[\w.]*) import ([\w, ]+)", text):
            names += [f"{module}.{name.split(' as ')[0].strip()}" for name in imported.split(",") if name.strip()]
        names = [name for name in names if name.split(".")[1] not in NOT_MODULES]
        absent |= {f"{path.relative_to(ROOT)}: {name}" for name in names if not exists(name)}
    assert not absent


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_finds_its_text(name):
    file, text, becomes, tests = MUTATIONS[name]
    assert text in (PACKAGE / file).read_text() and text != becomes
    assert all((ROOT / "tests" / "unit" / test).exists() for test in tests)


def test_pure_rooms_load_nothing_heavy():
    """The contracts see direct imports; this sees what really comes with them."""
    pure = (
        "rewards",
        "data",
        "config",
        "plan",
        "algo/advantages",
        "algo/aggregation",
        "algo/schedule",
        "types",
        "errors",
    )
    modules = [path.relative_to(ROOT).with_suffix("") for path in sources()]
    found = [".".join(m.parts) for m in modules if any(m.is_relative_to(Path("tatar_dist", p)) for p in pure)]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *found], cwd=ROOT, capture_output=True, check=True, text=True)
    assert len(found) > 50 and not {"torch", "ray", "vllm", "deepspeed", "transformers"} & set(done.stdout.split())


def test_every_directory_of_the_package_is_a_room_with_a_floor():
    assert all((path.parent / "__init__.py").exists() for path in sources())
    body = ast.parse((PACKAGE / "config" / "__init__.py").read_text()).body
    assert len(body) == 1  # its docstring: the contracts know the floors of its modules, not one of its own


def test_the_loop_sets_few_attributes_of_other_objects():
    """What a class needs should be in its constructor."""
    found = []
    for name in ("grpo", "sft", "sampling", "trainer", "cluster/ray_cluster", "learner/group", "evaluate/runner"):
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in (t for t in targets if isinstance(t, ast.Attribute)):
                if not (isinstance(target.value, ast.Name) and target.value.id == "self"):
                    found.append(f"{name}: {ast.unparse(target)}")
    assert len(found) <= FOREIGN_WRITES, found
