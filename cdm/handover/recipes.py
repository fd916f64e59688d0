"""Recipes: complete params files with a name, each explained by the comment at its head."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cdm.errors import CdmError
from cdm.system import git


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

    Raises CdmError if there is none of that name, or if `to` holds what is in no commit of Git (unless `force`).
    """
    recipes = {recipe.name: recipe for recipe in list_recipes(folder)}
    if name not in recipes:
        raise CdmError(f"no recipe {name!r}: there are {', '.join(recipes)}")
    recipe = recipes[name]
    if to.is_dir():
        raise CdmError(f"--to is {to}, which is a folder: give the name of a params file")
    same = to.exists() and to.read_bytes() == recipe.path.read_bytes()
    if to.exists() and not (same or force or git.holds(to)):
        raise CdmError(
            f"{to}: has changes that no commit holds: commit them, give --to another name, or --force to lose them"
        )
    if not same:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recipe.path, to)
    return recipe


def _comment(path: Path) -> list[str]:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines
