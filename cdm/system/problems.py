"""What the system and the libraries raise, as a line that says what is wrong and what to do.

Some errors do not say which file they are about: `naming`, around what reads or writes one, does. The commands tell
what is left (`cdm.system.boundary`).
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cdm.errors import CdmError, line

REMEDIES = {
    errno.ENOSPC: "the disk is full: make room there, and run it again",
    errno.EDQUOT: "the quota of this disk is used up: make room there, and run it again",
    errno.EFBIG: "larger than this system lets a file become (`ulimit -f`): raise the limit, and run it again",
    errno.EROFS: "lies on a disk that may only be read: name another place",
    errno.EACCES: "this user may not read or write it: change its permissions, or name another place",
    errno.EPERM: "this user may not change it: change its permissions, or name another place",
    errno.EEXIST: "a file is in the way of a folder of this name: move it away, and run it again",
    errno.ENOTDIR: "a file, where a folder is needed: move it away, and run it again",
    errno.EISDIR: "a folder, where a file is needed: move it away, or give another name",
    errno.ENOTEMPTY: "a folder that holds something is in the way: move it away, and run it again",
    errno.ENOENT: "not there: name what is, or run the stage again that writes it",
    errno.ENAMETOOLONG: "this name is too long: give a shorter one",
    errno.ELOOP: "links that lead to each other, and to no file: remove them",
    errno.EMFILE: "too many files are open (`ulimit -n`): raise the limit, and run it again",
    errno.ENFILE: "too many files are open on this machine: end other programs, and run it again",
    errno.EIO: "the disk does not answer as it should: look at it, or name another place",
}
"""What to do about an error of the system, by its number."""
WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors of copying that are about the copy, not about what is copied."""
OUT_OF_MEMORY = (
    "not enough memory: lower runtime.micro_batch in a training, runtime.batch_size elsewhere, or end other"
    " programs"
)


def explained(error: BaseException) -> str | None:
    """What is wrong and what to do, a line for each problem; None for an error that is the program's own."""
    if isinstance(error, CdmError):
        return "\n".join(line(each) for each in str(error).splitlines())
    file, reason = _file_of(error), _reason(error)
    if reason is None:
        return None
    return line(f"{file}: {reason}" if file else reason)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Around what reads or writes a file: an error that does not say which one becomes a CdmError that names `path`."""
    try:
        yield
    except CdmError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None or _file_of(error):
            raise
        raise CdmError(line(f"{path}: {reason}")) from error


def _file_of(error: BaseException) -> str:
    """The file that an error of the system is about; empty where it does not say."""
    if not isinstance(error, OSError):
        return ""
    copies = _copies(error)
    if copies:
        return str(copies[0][1])
    second = getattr(error, "filename2", None)
    name = second if second and error.errno in WRITING else error.filename
    if name is None or isinstance(name, int):
        return ""
    path = os.fsdecode(name)
    return _in_the_way(path) if error.errno == errno.ENOTDIR else path


def _in_the_way(path: str) -> str:
    """The file that stands where a folder of `path` should be."""
    above = reversed([Path(path), *Path(path).parents])
    return str(next((each for each in above if each.exists() and not each.is_dir()), path))


def _copies(error: OSError) -> list[tuple[str, str, str]]:
    """What shutil.copytree could not copy: source, target and reason of each file."""
    first = error.args[0] if error.args else None
    return first if isinstance(first, list) else []


def _reason(error: BaseException) -> str | None:
    """What is wrong and what to do, without the file."""
    match error:
        case MemoryError():
            return OUT_OF_MEMORY
        case RecursionError():
            return "nested too deeply: is it the right file?"
        case UnicodeDecodeError():
            return f"not UTF-8 text (byte {error.start}): save it as UTF-8"
        case UnicodeEncodeError():
            return "half a surrogate pair is no text: write it anew"
        case json.JSONDecodeError():
            return f"not valid JSON: {error}"
        case OSError():
            copies = _copies(error)
            known = REMEDIES.get(error.errno or 0)
            return _remedy(copies[0][2]) if copies else known or _remedy(error.strerror or str(error))
        case EOFError() if "marshal" in str(error):
            return "what Python compiled is damaged, as after a full disk: delete the folders __pycache__ here"
        case RuntimeError() if "out of memory" in str(error) or "can't allocate memory" in str(error):
            return f"{str(error).splitlines()[0].partition('. ')[0]}: {OUT_OF_MEMORY}"
    if type(error).__name__ == "SafetensorError":
        return _remedy(str(error), f"not a readable safetensors file ({error})")
    return None


def _remedy(text: str, otherwise: str | None = None) -> str:
    """What to do about an error of the system of which a library says only the text."""
    return next((REMEDIES[number] for number in REMEDIES if os.strerror(number) in text), otherwise or text)
