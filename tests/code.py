"""What the repository's code imports and reads, found in its syntax trees without running it.

Which modules a stage imports, directly or not, and which parameters a file reads and a stage declares.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

from cdm.families import family_names
from cdm.params import Params
from cdm.system.provenance import THE_FAMILY

ROOT = Path(__file__).parent.parent
PACKAGES = ("cdm", "comparison", "judging", "stages", "miniature")

FAMILIES = "cdm.families"
"""The package that imports one of its modules by the name of `teacher.family`."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the repository's packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


def _imports(node: ast.AST) -> Iterator[tuple[str, str, str | None]]:
    """(local name, module, name in it or None) of every import below `node`, except those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.asname or alias.name, alias.name, None
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute here"
            for alias in child.names:
                if f"{child.module}.{alias.name}" in modules():
                    yield alias.asname or alias.name, f"{child.module}.{alias.name}", None
                else:
                    yield alias.asname or alias.name, str(child.module), alias.name
        else:
            yield from _imports(child)


@cache
def imported_modules(module: str) -> frozenset[str]:
    """What `module` itself imports, anywhere in its text."""
    return frozenset(imported for _, imported, _ in _imports(tree(module)))


@cache
def _is_empty(module: str) -> bool:
    """Whether there is nothing but a docstring, so that no change of the file can change a result."""
    return all(
        isinstance(node, ast.Expr) or (isinstance(node, ast.ImportFrom) and node.module == "__future__")
        for node in tree(module).body
    )


def imported_files(module: str, without: Collection[str] = ()) -> set[str]:
    """Files, relative to the repository, of `module` and of all that it imports of the repository, transitively.

    A file beside a module that the module names in a string, such as a template, counts as imported, and so does the
    module of "module:name" in a string. Modules whose file is in `without` do not count, nor does what only they
    import. Whatever asks for a family by name imports what any family imports; the one family's own file is
    `THE_FAMILY`.
    """
    families = {f"{FAMILIES}.{name}" for name in family_names()}
    waiting, seen = [module], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in modules() or _file(name) in without:
            continue
        seen.add(name)
        parts = name.split(".")
        waiting += [".".join(parts[:i]) for i in range(1, len(parts))]  # a package's __init__ runs first
        waiting += [*imported_modules(name), *_named_modules(name)]
        waiting += families if name == FAMILIES else []
    found = {modules()[name] for name in seen - families if not _is_empty(name)}
    found |= {path for name in seen for path in _named_files(name)}
    return {str(path.relative_to(ROOT)) for path in found} | ({THE_FAMILY} if seen & families else set())


def _file(module: str) -> str:
    return str(modules()[module].relative_to(ROOT))


@cache
def _strings(module: str) -> frozenset[str]:
    return frozenset(
        child.value
        for child in ast.walk(tree(module))
        if isinstance(child, ast.Constant) and isinstance(child.value, str)
    )


def _named_modules(module: str) -> list[str]:
    """Modules that its strings name to be imported when they are used: the first part of "module:name"."""
    names = [re.fullmatch(r"(cdm[\w.]*):\w[\w.]*", string) for string in _strings(module)]
    return [name[1] for name in names if name and name[1] in modules()]


@cache
def _named_files(module: str) -> frozenset[Path]:
    """Files beside a module that one of its strings names."""
    strings = _strings(module)
    beside = [path for path in modules()[module].parent.iterdir() if path.is_file() and path.suffix != ".py"]
    return frozenset(path for path in beside if path.name in strings)


def keys_declared(module: str) -> list[str]:
    """Keys of the parameters that a stage names in `with stage("KEY", ...)`, which watches them for changes."""
    (call,) = (
        child
        for child in ast.walk(tree(module))
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id == "stage"
    )
    return [ast.literal_eval(argument) for argument in call.args]


def _attributes(module: str) -> tuple[list[ast.Attribute], set[ast.expr]]:
    """Every attribute that a module mentions, and the expressions that they are attributes of."""
    attributes = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)]
    return attributes, {node.value for node in attributes}


def keys_read(module: str) -> set[str]:
    """Keys that a module reads itself, as `params.SECTION` or `params.SECTION.KEY`, and no deeper."""
    attributes, owners = _attributes(module)
    whole = [ast.unparse(node) for node in attributes if node not in owners]  # a.b.c, but not its a.b
    keys = {key for text in whole for key in re.findall(r"\bparams\.(\w+(?:\.\w+)?)", text)}
    return {key for key in keys if key.split(".")[0] in Params.model_fields}


def passes_params(module: str) -> bool:
    """Whether a module hands the whole `params` on, instead of sections of it."""
    _, owners = _attributes(module)
    named = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Name) and node.id == "params"]
    return any(isinstance(node.ctx, ast.Load) and node not in owners for node in named)
