"""A finished run on the hub: its file, its config and a model card that is made from these and from results."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import SalunError
from ..files import make_folder
from ..options import checked, option, options_from
from . import remote

PICTURE = "before-after.png"


@dataclass
class PushConfig:
    """Upload a finished run to the hub: the erasure, its config.json, and a model card made from the run's files and
    from results of `python -m eval`, as one commit. load_erasure(pipe, "owner/name") then loads it.

    The card says what was forgotten in which base model, how, what was measured, how to load it and what it does not
    promise. A README.md that is there already is replaced. --dry_run DIR writes the same files into a folder instead.
    """

    run: str = option(None, "a finished run's folder", positional=True, required=True, metavar="RUN")
    hub_model_id: str | None = option(
        None, "the repository: owner/name, or a name among your own; the run folder's name unless given", metavar="ID"
    )
    hub_token: str | None = option(
        None, "a token that may write there; HF_TOKEN's or that of `hf auth login` unless given", metavar="TOKEN"
    )
    hub_private_repo: bool = option(False, "if the repository is made now, make it private")
    results: list[str] = option(
        [], "folders of results of `python -m eval` that measure this erasure: their scores go into the card, and some "
        "of accuracy's or composition's pictures",
        several=True, metavar="DIR",
    )  # fmt: skip
    license: str | None = option(
        None, "the card's licence, as the hub spells it (openrail, apache-2.0 …); that which the base model's card "
        "names unless given",
        metavar="ID",
    )  # fmt: skip
    with_mask: bool = option(False, "upload mask.safetensors too, with which others can train the same weights")
    no_pictures: bool = option(False, "no pictures of the results in the card, as always where nudity was forgotten")
    dry_run: str | None = option(
        None, "write what would be uploaded into this new folder, and upload nothing", metavar="DIR"
    )


@dataclass(frozen=True)
class Pushed:
    """What :func:`push` did.

    Attributes:
        repo_id: owner/name; None for a dry run.
        commit: the commit's hash; pass it as ``revision`` to load exactly this; None for a dry run.
        url: of the repository, or the dry run's folder.
        files: what was uploaded, by name.
    """

    repo_id: str | None
    commit: str | None
    url: str
    files: list[str]


def push(run, repo_id: str | None = None, **options) -> Pushed:
    """Upload a finished run to the hub, with a model card.

    Args:
        run: what :func:`salun_diffusion.erase` returned, or a run folder.
        repo_id: "owner/name", or a name among those of the token's user; the run folder's name without it.
        options: further fields of :class:`PushConfig`.

    Raises:
        SalunError: an unfinished run, results that do not measure it, an id that is malformed, no token, or a hub that
            refuses or cannot be reached. The run's files are only read.
    """
    settings = {"run": str(getattr(run, "path", run))} | ({"hub_model_id": repo_id} if repo_id else {}) | options
    return push_run(options_from(checked(settings, PushConfig, "push():"), PushConfig), say=lambda text: None)


def push_run(options: PushConfig, say=print) -> Pushed:
    """:func:`push` from its options; ``say`` gets what was done."""
    from .card import card, read_run  # only now, so that --help answers at once
    from .measured import read_results, sheet

    about = read_run(Path(options.run))
    wanted = remote.check_id(options.hub_model_id or Path(options.run).absolute().name)
    token = None if options.dry_run else remote.check_token(options.hub_token)
    if options.dry_run and Path(options.dry_run).exists():
        raise SalunError(f"{options.dry_run} exists: name another --dry_run, or remove it.")
    measured = [read_results(Path(folder), about.digest) for folder in options.results]
    hidden = options.no_pictures or "nudity" in about.concept.lower()  # what the base model draws there is not shown
    pictures = None if hidden else next(filter(None, map(sheet, measured)), None)
    license = options.license or (remote.license_of(about.base_id, about.base_revision, token) if token else None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = ["config.json", *(["mask.safetensors"] if options.with_mask else [])]
        for path in (about.file, *(about.folder / name for name in names)):
            if not path.is_file():
                raise SalunError(f"{path} is not there: leave --with_mask out.")
            shutil.copyfile(path, folder / path.name)
        if pictures:
            pictures.save(folder / PICTURE)
        repo_id = wanted if options.dry_run else remote.make_repository(wanted, token, options.hub_private_repo)
        text = card(about, repo_id, measured, PICTURE if pictures else None, license)
        (folder / "README.md").write_text(text, encoding="utf-8")
        files = sorted(path.name for path in folder.iterdir())
        if options.dry_run:
            shutil.copytree(folder, make_folder(options.dry_run), dirs_exist_ok=True)
            say(f"{options.dry_run}: {', '.join(files)}. Nothing was uploaded.")
            return Pushed(None, None, options.dry_run, files)
        commit, url = remote.upload(folder, repo_id, token, f"An erasure of {about.concept}")
    say(f'Uploaded to {url} ({commit[:7]}): load it with salun_diffusion.load_erasure(pipe, "{repo_id}").')
    return Pushed(repo_id, commit, url, files)
