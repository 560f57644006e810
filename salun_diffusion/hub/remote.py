"""What is asked of the hub, by huggingface_hub alone; what goes wrong there is said in a sentence, without tokens."""

from contextlib import contextmanager
from pathlib import Path

from ..errors import SalunError

REFUSALS = {
    401: "the hub does not accept the token: make a new one that may write (HF_TOKEN, --hub_token or `hf auth login`)",
    403: "this token may not write there: use one with write access, or another owner",
    404: "the hub has no such owner or repository, or this token may not see it: check the id",
    409: "something else changed the repository meanwhile: try again",
    413: "a file is too large for the hub",
    429: "the hub asks to wait: try again later",
}


def check_id(repo_id: str) -> str:
    """``repo_id``, if the hub could have such a repository.

    Raises:
        SalunError: it could not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise SalunError(
            f"'{repo_id}' can be no repository on the hub: give --hub_model_id owner/name of letters, digits, '-', '_' "
            "and '.', 96 at most."
        ) from None
    return repo_id


def check_token(token: str | None) -> str:
    """``token``, or the one that huggingface_hub knows of.

    Raises:
        SalunError: there is none.
    """
    from huggingface_hub import get_token

    if not (token := token or get_token()):
        raise SalunError(
            "Nothing can be uploaded without a token of the hub: give --hub_token, set HF_TOKEN, or log in once by "
            "`hf auth login`."
        )
    return token


def make_repository(repo_id: str, token: str, private: bool) -> str:
    """Make the repository unless it is there, and return its whole id.

    Raises:
        SalunError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import create_repo

    with asking(repo_id):
        return create_repo(repo_id, token=token, private=private or None, exist_ok=True).repo_id


def upload(folder: Path, repo_id: str, token: str, message: str) -> tuple[str, str]:
    """Upload all files of ``folder`` as one commit.

    Returns:
        The commit's hash, and the repository's page.

    Raises:
        SalunError: as :func:`make_repository`.
    """
    from huggingface_hub import upload_folder

    with asking(repo_id):
        made = upload_folder(folder_path=folder, repo_id=repo_id, token=token, commit_message=message)
        return made.oid, made.repo_url.url


def license_of(base_id: str | None, revision: str | None, token: str) -> str | None:
    """The licence that the base model's card on the hub names; None where it cannot be had: a card without one is still
    a card.
    """
    if base_id is None:
        return None
    from huggingface_hub import ModelCard, hf_hub_download

    try:
        path = hf_hub_download(base_id, "README.md", revision=revision, token=token)
        license = ModelCard.load(path, ignore_metadata_errors=True).data.license
    except Exception:  # the hub's, the network's, YAML's
        return None
    return license if isinstance(license, str) else None


@contextmanager
def asking(repo_id: str):
    """Within it, whatever the hub or the way there does wrong is a SalunError."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        told = " ".join((getattr(error, "server_message", None) or "no reason was given").split())[:300]
        reason = REFUSALS.get(status, f"the hub answered {status} ({told.rstrip('.')}): try again, or mend that")
        raise SalunError(f"Nothing was uploaded to {repo_id}, for {reason}.") from None
    except Exception as error:  # no route, time-outs, offline mode: each version of the library has classes of its own
        raise SalunError(
            f"Nothing was uploaded to {repo_id}, for the hub cannot be reached ({type(error).__name__}): check the "
            "connection, and that HF_HUB_OFFLINE is not set."
        ) from None
