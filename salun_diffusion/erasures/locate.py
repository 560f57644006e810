"""Where an erasure's file is: on this machine, or on the hub."""

import logging
import re
from pathlib import Path

from ..errors import SalunError

logger = logging.getLogger(__name__)

FILE_NAME = "erasure.safetensors"
ADAPTER_NAME = "pytorch_lora_weights.safetensors"  # where pipe.load_lora_weights(FOLDER) looks


def locate(source, revision=None) -> tuple[Path, str | None]:
    """The file that ``source`` means, and the commit if it came from the hub.

    Args:
        source: a file, a folder that holds ``erasure.safetensors`` or ``pytorch_lora_weights.safetensors`` (the first
            where there are both), or a hub id "owner/name".
        revision: branch, tag or commit, for a hub id.

    Raises:
        SalunError: it is not there, or a revision was given for a local file.
    """
    try:
        text, path = str(source), Path(source).expanduser()
        path.exists()
    except (TypeError, ValueError, RuntimeError, OSError) as error:  # no path, NUL in it, no such user, too long
        raise SalunError(
            f"{source!r:.100} can be no path ({error!s:.100}): give a file, a run folder or a hub id."
        ) from None
    if path.is_dir():
        found = [path / name for name in (FILE_NAME, ADAPTER_NAME) if (path / name).exists()]
        path = found[0] if found else path / FILE_NAME
        if not found:
            raise SalunError(
                f"{path.parent} holds no {FILE_NAME} and no {ADAPTER_NAME}; give a finished run's folder, or a file."
            )
    if path.exists():
        if revision is not None:
            raise SalunError(f"revision={revision!r} is for hub ids, but {path} is a local file; leave it out.")
        return path, None
    # owner/name is a hub id, unless it starts as a path of ours or another suffix or folder shows that a file is meant
    hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) and not text.endswith(".safetensors")
    if not hub_id or text.startswith("runs/") or path.parent.is_dir():
        raise SalunError(f"{path} does not exist; give a file, a run folder with {FILE_NAME}, or a hub id owner/name.")
    return _download(text, revision)


def _download(hub_id: str, revision) -> tuple[Path, str]:
    from huggingface_hub import errors, hf_hub_download

    logger.warning("%s is no local file or folder: asking the hub for it.", hub_id)
    try:
        try:
            path = Path(hf_hub_download(hub_id, FILE_NAME, revision=revision))
        except errors.RemoteEntryNotFoundError:
            path = Path(hf_hub_download(hub_id, ADAPTER_NAME, revision=revision))
    except Exception as error:  # no network, time-outs, a malformed id: each hub version has classes of its own
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
        error = cause if isinstance(cause, errors.HfHubHTTPError) else error  # the hub was there, and refused
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError) or status in (401, 403) and type(error) is errors.HfHubHTTPError:
            reason = "it may not be read with this token, or without one: log in by `hf auth login`, or set HF_TOKEN"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = "there is no such repository, or it is private: log in by `hf auth login`, or set HF_TOKEN"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = f"the repository has no revision {revision!r}"
        elif isinstance(error, errors.EntryNotFoundError) and cause is None and status == 404:
            reason = "the repository holds no such file"
        else:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SalunError(
            f"{hub_id} is no local file or folder, and {FILE_NAME} could not be fetched from the hub under that id "
            f"({reason.rstrip('.')}); give a local path, or check the id and the connection."
        ) from error
    return path, path.parent.name  # the hub's cache keeps each file in a folder named by its commit
