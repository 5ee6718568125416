"""The walls of the house: import direction and style bounds, by parsing every file."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("library", "networks", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")) + sorted(
    ROOT.glob("*.py")
)
SCRIPTS = {"sdxl_train_network.py", "anima_train_network.py", "gen_img.py", "anima_minimal_inference.py", "run.py"}
FAMILIES = sorted(path.name for path in (ROOT / "library" / "models").iterdir() if (path / "names.py").is_file())

MAY_IMPORT = {
    "library.core": {"library.core"},
    "library.diffusion": {"library.diffusion", "library.core"},
    "library.data": {"library.data", "library.core"},
    "library.models": {"library.models", "library.diffusion", "library.data", "library.core"},
    "networks": {"networks", "library.models.architecture", "library.models.naming", "library.core"},
    "library.training": {
        "library.training",
        "library.inference",
        "networks",
        "library.models",
        "library.diffusion",
        "library.data",
        "library.core",
    },
    "library.inference": {"library.inference", "networks", "library.models", "library.diffusion", "library.data", "library.core"},
}
"""Package -> packages it may import. Scripts, tools and benchmarks may import all."""

LONG_FUNCTIONS: dict[str, str] = {}
"""`path:function` longer than 60 lines -> the reason."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in FILES:
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield node.module or ""


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_imports_go_down() -> None:
    ours = ("library", "networks", "tools", "benchmarks")
    upward = []
    for path, tree in trees():
        package = next((package for package in MAY_IMPORT if name_of(path).startswith(package + ".")), None)
        for module in imports(tree) if package else ():
            allowed = any(module == target or module.startswith(target + ".") for target in MAY_IMPORT[package or ""])
            if module.split(".")[0] in ours and not allowed:
                upward.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not upward


def test_nothing_outside_its_folder_names_a_family() -> None:
    families = [folder.name for folder in (ROOT / "library/models").iterdir() if (folder / "names.py").is_file()]
    assert "sdxl" in families
    shared = [path for path in FILES if path.parts[len(ROOT.parts)] in ("library", "networks")]
    outside = [path for path in shared if not any(f"library/models/{family}" in path.as_posix() for family in families)]
    named = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in outside
        for module in imports(ast.parse(path.read_text(encoding="utf-8")))
        if any(module.startswith(f"library.models.{family}") for family in families)
    ]
    assert not named


def test_files_and_functions_are_short() -> None:
    long = [f"{path.relative_to(ROOT)}" for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 400]
    for path, tree in trees():
        for function in functions(tree):
            where = f"{path.relative_to(ROOT)}:{function.name}"
            if (function.end_lineno or 0) - function.lineno >= 60 and where not in LONG_FUNCTIONS:
                long.append(where)
    assert not long


def test_parameters_are_typed() -> None:
    untyped = []
    for path, tree in trees():
        for function in functions(tree):
            parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            untyped += [
                f"{path.relative_to(ROOT)}:{function.name}({parameter.arg})"
                for parameter in parameters
                if parameter.annotation is None and parameter.arg not in ("self", "cls")
            ]
    assert not untyped


def test_only_scripts_print() -> None:
    printing = []
    for path, tree in trees():
        is_script = path.name in SCRIPTS or path.relative_to(ROOT).parts[0] in ("tools", "benchmarks")
        calls = (
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        )
        printing += [f"{path.relative_to(ROOT)}:{call.lineno}" for call in calls if not is_script]
    assert not printing


def test_text_is_ascii() -> None:
    strange = [f"{path.relative_to(ROOT)}" for path in FILES if not path.read_text(encoding="utf-8").isascii()]
    assert not strange


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_public_things_have_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    things = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]
    assert ast.get_docstring(tree), "the file says what it is"
    assert [thing.name for thing in things if not ast.get_docstring(thing)] == []


def test_test_files_have_names_of_their_own() -> None:
    """Without packages pytest imports two files of one name as one module: the second is an error, unless bytecode of it lies about."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("*.py") if path.name not in ("conftest.py", "__init__.py"))
    assert [name for name, other in itertools.pairwise(names) if name == other] == []


def test_no_code_outside_of_a_family_names_it() -> None:
    """In names, imports and texts of library/ and networks/; comments and docstrings may give one as an example."""
    naming = []
    for path, tree in trees():
        place = path.relative_to(ROOT).parts
        if place[0] not in ("library", "networks") or (place[:2] == ("library", "models") and place[2] in FAMILIES):
            continue
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        words = (word for node in ast.walk(tree) if id(node) not in docs for word in _words(node))
        naming += [f"{path.relative_to(ROOT)}: {word[:60]}" for word in words if any(_names(word, family) for family in FAMILIES)]
    assert len(FAMILIES) >= 2 and naming == []


def _names(word: str, family: str) -> bool:
    """Is the family's name in it, and not as the start of a longer word such as `animated`?"""
    return re.search(rf"{family}(?![a-z])", word.lower()) is not None


def _words(node: ast.AST) -> Iterator[str]:
    """What a node spells: a name, an attribute, a module, a text."""
    for field in ("id", "attr", "name", "module", "arg"):
        value = getattr(node, field, None)
        if isinstance(value, str):
            yield value
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
