"""Pushing an export to a hub: its files and its card, in one commit."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from cdm.errors import CdmError
from cdm.families.configs import INDEX
from cdm.handover.export import CARD
from cdm.models.student import LORA
from cdm.system.files import at_home


def check_push(repository: str) -> None:
    """Raises CdmError if nothing can be pushed to `repository` from here: it is no org/name, there is no token, or the
    hub is not to be asked. Asks no network."""
    from huggingface_hub import constants, errors, get_token
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except errors.HFValidationError as error:
        raise CdmError(f"{repository}: no name for a hub: {_line(error)}") from None
    if "/" not in repository:
        raise CdmError(f"{repository}: no name for a hub: give ORG/NAME, or USER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise CdmError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it")
    if get_token() is None:
        raise CdmError("not logged in to the hub: run `hf auth login`, with a token that may write")


def push(export: str | Path, repository: str, *, private: bool = False) -> str:
    """Pushes an export to `repository` on a hub, which is made if it is not there; returns its address.

    `export` is what `cdm.handover.export.export` has written: a folder, or a single file with its card beside it. All
    files come in one commit, so that the repository never holds half a student; files that it has besides stay. The
    card goes there with `repository` in the place of the path. The hub is that of HF_ENDPOINT, the token that of
    `hf auth login` or HF_TOKEN. A repository that is there keeps its visibility. Raises CdmError, in one line, which
    says how to push again.
    """
    path = at_home(export)
    card = _card_of(path)
    check_push(repository)
    from huggingface_hub import CommitOperationAdd, HfApi

    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
    text = card_on_hub(card.read_text(encoding="utf-8"), path.name, repository)
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    operations = [CommitOperationAdd(CARD, text.encode())] + [
        CommitOperationAdd(each.relative_to(path).as_posix() if path.is_dir() else each.name, each)
        for each in files
        if each != card
    ]
    api = HfApi()
    try:
        address = str(api.create_repo(repository, private=private or None, exist_ok=True))
        if private and not api.model_info(repository).private:
            raise CdmError(
                f"{repository}: is there already, for everybody to see: nothing was pushed. Make it private on"
                f" {address}/settings, or give another name"
            )
        api.create_commit(repository, operations, commit_message=f"Push {path.name}")
    except (OSError, ValueError, RuntimeError, _http_error()) as error:
        again = shlex.join(["cdm", "push", str(path), repository, *(["--private"] if private else [])])
        raise CdmError(
            f"{repository}: not pushed: {_problem(error, api.endpoint)}. {path} is whole; to push it: {again}"
        ) from None
    return address


def _card_of(path: Path) -> Path:
    """The card of the export at `path`; CdmError if `path` is none."""
    if path.is_dir():
        card, whole = path / CARD, (path / INDEX).is_file() or (path / LORA).is_file()
    else:
        card, whole = path.with_suffix(".md"), path.suffix == ".safetensors" and path.is_file()
    if not whole or not card.is_file():
        raise CdmError(f"{path}: no export there, or one without its card: push what `cdm export` has written")
    return card


def card_on_hub(text: str, name: str, repository: str) -> str:
    """A card's `text` as it is to be on a hub: what it loads from the path `name` comes from `repository` there."""
    single = name.endswith(".safetensors")
    source = f"https://huggingface.co/{repository}/blob/main/{name}" if single else repository
    fetch = f"hf download {repository} {f'{name} --local-dir .' if single else f'--local-dir {name}'}"
    text = re.sub(rf"^# {re.escape(name)}$", f"# {repository.split('/')[1]}", text, flags=re.MULTILINE)
    text = re.sub(rf'(\(\s*)"{re.escape(name)}"', rf'\1"{source}"', text)
    return re.sub(rf"^(cdm sample .*--student {re.escape(name)} )", rf"{fetch}\n\1", text, flags=re.MULTILINE)


def _http_error() -> type[Exception]:
    """The class of errors of the HTTP library that huggingface_hub uses: which one it is changes with its version."""
    from huggingface_hub import errors

    return errors.HfHubHTTPError.__bases__[0]


def _problem(error: Exception, endpoint: str) -> str:
    """What went wrong, and what to do about it."""
    from huggingface_hub import errors

    # Of several uploads at once the hub's client says only that one has failed.
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    if isinstance(cause, errors.HfHubHTTPError):
        status, said = cause.response.status_code, cause.server_message or cause
        match status:
            case 401:
                return f"{endpoint} does not take the token: log in again with `hf auth login`"
            case 403:
                return f"the token may not write there ({_line(said)}): `hf auth login` with one that may"
            case _:
                return f"{endpoint} answers {status}: {_line(said)}"
    if isinstance(cause, _http_error()):
        return f"{endpoint} cannot be reached ({_line(cause)})"
    return _line(cause)


def _line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".")
