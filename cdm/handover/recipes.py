"""Recipes: complete params files with a name, each explained by the comment at its head."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cdm.errors import CdmError
from cdm.params import Params, ParamsError, read_yaml
from cdm.system import git
from cdm.system.places import check_file
from cdm.system.problems import naming


@dataclass(frozen=True)
class Recipe:
    """A params file in a folder of recipes."""

    name: str
    """That of the file, without its suffix."""
    path: Path
    comment: list[str]
    """The lines of the comment at its head."""

    @property
    def summary(self) -> str:
        """The first sentence of the comment, on one line."""
        first, _, _ = " ".join(self.comment).partition(". ")
        return first.rstrip(".:")


def list_recipes(folder: Path) -> list[Recipe]:
    """The recipes in `folder`, by name; raises CdmError if there are none."""
    found = [Recipe(path.stem, path, _comment(path)) for path in sorted(folder.glob("*.yaml"))]
    if not found:
        raise CdmError(f"{folder}: no recipes there: run this in the root of the repository, or give --recipes")
    return found


def use_recipe(folder: Path, name: str, to: Path, *, force: bool = False) -> Recipe:
    """Copy the recipe `name` to `to`.

    Raises CdmError if there is none of that name, if `to` cannot be written, or if it holds something else than
    parameters, or what is in no commit of Git (unless `force`).
    """
    recipes = {recipe.name: recipe for recipe in list_recipes(folder)}
    if name not in recipes:
        raise CdmError(f"no recipe {name!r}: there are {', '.join(recipes)}")
    recipe = recipes[name]
    if to.suffix not in (".yaml", ".yml"):
        raise CdmError(f"--to is {to}: give the name of a params file, which ends in .yaml")
    check_file(to)
    same = to.exists() and to.read_bytes() == recipe.path.read_bytes()
    if to.exists() and not (same or force or git.holds(to)):
        raise CdmError(
            f"{to}: has changes that no commit holds: commit them, give --to another name, or --force to lose them"
        )
    if to.exists() and not (same or force or _holds_params(to)):
        raise CdmError(f"{to}: not a params file: give --to another name, or --force to overwrite it")
    if not same:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recipe.path, to)
    return recipe


def _holds_params(path: Path) -> bool:
    """Whether a file is one of parameters, if not of valid ones."""
    try:
        values = read_yaml(path)
    except ParamsError:
        return path.name == "params.yaml"
    return isinstance(values, dict) and bool(values) and values.keys() <= Params.model_fields.keys()


def _comment(path: Path) -> list[str]:
    lines = []
    with naming(path):
        text = path.read_text(encoding="utf-8")
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines
