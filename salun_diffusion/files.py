"""Files and folders: written whole or not at all, held by one run at a time, known by their content."""

import glob
import hashlib
import json
import math
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import SalunError


@contextmanager
def writing(path):
    """Within it, what the file system refuses is said in a sentence, of ``path`` where the system names none.

    Raises:
        SalunError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise SalunError(f"Cannot write {error.filename or path}: {error.strerror or error}.") from error


def make_folder(path) -> Path:
    """``path`` as a folder, with those above it.

    Raises:
        SalunError: a file is in the way, the name is too long, or nothing may be written there.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SalunError(f"Cannot make the folder {path}: {error.strerror or error}; give another one.") from error
    return path


@contextmanager
def locked(folder, wanted: bool = True):
    """``folder``, made if need be, for this run alone; a process that dies lets go of it. One that stays empty goes.

    Args:
        folder: what a command writes into.
        wanted: False does nothing: of several processes of one run, one locks it.

    Raises:
        SalunError: another run has it, or nothing may be written there.
    """
    if not wanted:
        yield
        return
    from filelock import FileLock, Timeout

    folder = make_folder(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SalunError(
            f"Another run is writing into {folder}: wait for its end, or give another --output_dir."
        ) from None
    except OSError as error:
        raise SalunError(f"Cannot write into {folder}: {error.strerror or error}; give another folder.") from error
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held: a run that has opened this one meanwhile finds it gone
            os.unlink(lock.lock_file)
        lock.release()
        with suppress(OSError):
            folder.rmdir()


def sync_folder(path) -> None:
    """Have a new name in the folder survive a power cut, where the system can: Windows and many FUSE mounts cannot, and
    what was written there is whole all the same.
    """
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def replacing(path):
    """A binary file to write into; it takes the place of `path` only when all of it is on the disk.

    Raises:
        SalunError: the disk refuses it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        # what a killed process left; another that lives writes the same file within the hour, or not at all
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise SalunError(
                f"Cannot write {path}: {error.strerror or error}; what was there before is kept."
            ) from error
        raise
    sync_folder(path.parent)


def write_json(path, obj) -> None:
    """Write ``obj`` as indented JSON, atomically.

    Raises:
        SalunError: JSON cannot hold it, or the disk refuses it.
    """
    try:
        text = json.dumps(obj, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SalunError(f"Cannot write {path}: JSON cannot hold its content ({error}).") from error
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


def strict_json(text: str | bytes):
    """JSON by its standard: no name twice in an object, no NaN or Infinity, no nesting or number without bounds.

    Raises:
        ValueError: anything else.
    """

    def once(pairs):
        if len(found := dict(pairs)) != len(pairs):
            raise ValueError("a name stands twice in one object")
        return found

    def refuse(word):
        raise ValueError(f"{word} is no number of JSON")

    def finite(digits):
        number = float(digits)
        return number if math.isfinite(number) else refuse(digits)

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path):
    """What the JSON file holds, in UTF-8.

    Raises:
        OSError: the file system's.
        ValueError: it is no JSON, or nested too deep.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def sha256(*paths: Path) -> str:
    """The SHA-256 of a file's content, or of several files' one after the other, as 64 hex digits."""
    found = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                found.update(block)
    return found.hexdigest()


def key_of(content, length: int = 16) -> str:
    """The first ``length`` hex digits of the SHA-256 of ``content`` as JSON with sorted names: what caches, checkpoints
    and pictures are known by. Data alone goes in, so that the key is the same in every process.

    Raises:
        TypeError: a set or an object, whose order or text would differ from run to run.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:length]


def listed(names, at_most: int = 8) -> str:
    """'a, b and 3 more': names for an error message."""
    names = sorted(names)
    text = ", ".join(names[:at_most])
    return text if len(names) <= at_most else f"{text} and {len(names) - at_most} more"
