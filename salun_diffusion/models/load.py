"""Find and load a base model: a local diffusers folder or .safetensors file, a hub id, ``demo`` or ``digits``."""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SalunError
from ..files import read_json
from .complete import complete_modules
from .quantized import is_quantized
from .single_file import from_single_file

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

DENOISERS = ("unet", "transformer")  # what a pipeline calls the network that predicts noise
COMPONENTS = (*DENOISERS, "text_encoder")  # its networks that an erasure may change
WORN = "_salun_erasures"  # the attribute of such a network that holds the erasures that are applied to it


def packaged(name: str) -> Path | None:
    """The folder ``model/`` inside the importable Python package ``name``, or ``demo.name``, if that brings one: so do
    ``demo`` and ``digits`` in a clone of the repository.
    """
    if not name.isidentifier():
        return None
    found = [find_spec(name), find_spec(f"demo.{name}") if find_spec("demo") else None]
    folders = [Path(folder) / "model" for spec in found if spec for folder in spec.submodule_search_locations or []]
    return next((folder for folder in folders if (folder / "model_index.json").is_file()), None)


def resolve(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """``(where, commit)``: a local folder or .safetensors file and None, or a hub id and the commit that ``revision``
    names right now.

    Asks the hub for one small file, so that an unreachable hub is known before any long work.

    Raises:
        SalunError: no such folder, no pipeline in it, or a hub that cannot be reached or has no such model.
    """
    path = Path(name).expanduser()
    if not (path / "model_index.json").is_file():
        path = packaged(name) or path
        if name in ("demo", "digits") and path == Path(name):
            raise SalunError(
                f"The {name} model comes with a clone of the repository, not with the installed package: clone it."
            )
    if path.is_dir():
        if not (path / "model_index.json").exists():
            raise SalunError(f"{path} holds no diffusers pipeline (no model_index.json): give the folder that has one.")
        return str(path), None
    if path.is_file() and path.suffix == ".safetensors":
        return str(path), None
    if path.is_file() and path.suffix in (".ckpt", ".bin", ".pt", ".pth"):
        raise SalunError(
            f"{path} is a pickle, which can run code when loaded: give the same model as a .safetensors file, or as a "
            "diffusers folder."
        )
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise SalunError(
            f"There is no model folder {name}: give a folder with a model_index.json, "
            "a .safetensors file, a hub id, 'demo' or 'digits'."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        index = Path(hf_hub_download(name, "model_index.json", revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise SalunError(
            f"The hub has no model {name} at revision {revision or 'main'}, or you may not read it."
        ) from None
    except Exception as error:  # offline mode, no route, time-outs: each hub version has its own classes for them
        raise SalunError(
            f"{name} is no local folder and the hub cannot be reached ({type(error).__name__}): give the path of a "
            "downloaded pipeline folder, or try --pretrained_model_name_or_path demo."
        ) from None
    return name, index.parent.name  # the cache keeps each file under its commit: …/snapshots/COMMIT/model_index.json


def load_pipeline(
    name: str, revision: str | None = None, dtype: "torch.dtype | None" = None, variant: str | None = None
) -> "DiffusionPipeline":
    """The whole pipeline, in fp32 unless ``dtype`` says otherwise (its autoencoder in fp32 always: some overflow in
    fp16), from safetensors only, its safety checker left out: erasure is measured without one.

    Raises:
        SalunError: as :func:`resolve`, or weights that diffusers cannot load.
    """
    import torch
    from diffusers import DiffusionPipeline

    where, commit = resolve(name, revision)
    kind: type[DiffusionPipeline] = DiffusionPipeline
    if Path(where).is_file():
        return from_single_file(Path(where), dtype, variant)
    index = _index(where, commit)
    options = {"safety_checker": None} if "safety_checker" in index else {}
    dtypes = {"vae": torch.float32, "default": dtype or torch.float32}
    options |= complete_modules(where, commit, index, dtypes, variant, options)
    if _is_pixel_unet(index):  # of such a folder diffusers makes a pipeline that knows no classes
        from .class_pipeline import ClassConditionalPipeline as kind
    try:
        pipe = kind.from_pretrained(
            where, revision=commit, variant=variant, dtype=dtypes, use_safetensors=True, **options
        )
    except Exception as error:  # each part's library has kinds of its own for a file that is damaged or not there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SalunError(f"{name} could not be loaded: {reason}{_instead(where, variant)}.") from None
    if index["_class_name"] == "DiTPipeline" and index.get("id2label"):
        pipe.register_to_config(id2label=index["id2label"])  # which that class forgets, and does not save
    return pipe


def described_in(where: str, commit: str | None) -> Path | None:
    """The folder of the files that say which concepts a base model knows: a local model's own; for a class-conditional
    one on the hub, that of its configs in the cache; None for any other.
    """
    if commit is None:
        return Path(where)
    index, parts = _index(where, commit), []
    if index["_class_name"] == "DiTPipeline":
        parts = ["transformer"]
    elif _is_pixel_unet(index):
        parts = ["unet"]
    if not parts:
        return None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(where, f"{parts[0]}/config.json", revision=commit)).parents[1]
    except Exception as error:  # as in resolve
        raise SalunError(f"{where} could not be fetched from the hub ({type(error).__name__}): try again.") from None


def _is_pixel_unet(index: dict) -> bool:
    """Whether a model_index.json's pipeline is an unconditional or class-conditional U-Net and a scheduler alone."""
    parts = {name: value for name, value in index.items() if isinstance(value, list)}
    return parts.keys() == {"unet", "scheduler"} and parts["unet"][1] == "UNet2DModel"


def _instead(where: str, variant: str | None) -> str:
    """What to do about weights that were not found, as far as the files of a local folder tell."""
    files = list(Path(where).glob("*/*")) if Path(where).is_dir() else []
    variants = {
        file.name.split(".")[1] for file in files if file.suffix == ".safetensors" and file.name.count(".") == 2
    }
    variants = sorted(name for name in variants if "-of-" not in name)
    if variants and variant not in variants:
        return f"; its weights are of a variant: give --variant {' or '.join(variants)}"
    if variant is not None:
        return f"; leave --variant {variant} out"
    if any(file.suffix == ".bin" for file in files):
        return (
            "; its weights are pickles (.bin), which can run code when loaded: if you trust them, save them anew by "
            f"DiffusionPipeline.from_pretrained({where!r}, use_safetensors=False).save_pretrained(FOLDER)"
        )
    return ""


def _index(where: str, commit: str | None) -> dict:
    """What a pipeline's model_index.json says: its class, and part → library and class.

    Raises:
        SalunError: it, or a part's config in a local folder, is damaged, or of something else.
    """
    path = Path(where) / "model_index.json"
    if not path.exists():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(where, "model_index.json", revision=commit))
    try:
        found = read_json(path)
        parts = [value for value in found.values() if isinstance(value, list)]
        if not isinstance(found["_class_name"], str) or not all(
            len(part) == 2 and all(isinstance(name, str | None) for name in part) for part in parts
        ):
            raise ValueError("it does not name the pipeline's class and its parts' classes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise SalunError(f"{path} is no diffusers pipeline's ({told}): fetch it again.") from None
    import diffusers

    for part, (library, kind) in ((name, value) for name, value in found.items() if isinstance(value, list)):
        # any other is imported by its name, or is a file of the folder's own, which would run
        if library not in (None, "diffusers", "transformers") and not hasattr(diffusers.pipelines, library):
            raise SalunError(
                f"{path} takes its {part}, {kind}, from '{library}', and code of a model's own is never run: give a "
                "pipeline of diffusers' and transformers' own classes."
            )
    if not hasattr(diffusers, found["_class_name"]):
        raise SalunError(
            f"{path} is a {found['_class_name']}, which this diffusers {diffusers.__version__} does not have, and code "
            "of a model's own is never run: give a pipeline of diffusers' own classes."
        )
    for path in Path(where).glob("*/*config.json"):  # for some that are damaged, diffusers would ask the hub
        try:
            whole = isinstance(read_json(path), dict)
        except (OSError, ValueError):
            whole = False
        if not whole:
            raise SalunError(f"{path} is damaged, for it holds no JSON mapping: fetch it again.")
    return found


def denoiser(pipe: "DiffusionPipeline") -> "torch.nn.Module":
    """The network of a diffusers pipeline that predicts noise: ``pipe.unet`` or ``pipe.transformer``.

    Raises:
        SalunError: the pipeline has neither.
    """
    import torch

    for name in DENOISERS:
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module):
            return getattr(module, "_orig_mod", module)  # torch.compile wraps the module and prefixes its names
    raise SalunError(f"{type(pipe).__name__} has neither a unet nor a transformer; give a diffusion pipeline.")


def component(pipe: "DiffusionPipeline", name: str | None) -> "torch.nn.Module":
    """The network of a diffusers pipeline that is called ``name``, one of ``COMPONENTS``; without a name, its denoiser.

    Raises:
        SalunError: the pipeline has no such network.
    """
    import torch

    module = denoiser(pipe) if name is None else getattr(pipe, name, None)
    if not isinstance(module, torch.nn.Module):
        there = [part for part in COMPONENTS if isinstance(getattr(pipe, part, None), torch.nn.Module)]
        raise SalunError(
            f"{type(pipe).__name__} has no {name} (of {', '.join(COMPONENTS)} it has: {', '.join(there)})."
        )
    return getattr(module, "_orig_mod", module)


def components(pipe: "DiffusionPipeline") -> "list[torch.nn.Module]":
    """All networks of the pipeline that an erasure may change, the denoiser first."""
    import torch

    others = [name for name in COMPONENTS if isinstance(getattr(pipe, name, None), torch.nn.Module)]
    return list(dict.fromkeys([denoiser(pipe), *(component(pipe, name) for name in others)]))


def sampler(pipe: "DiffusionPipeline") -> dict:
    """The scheduler's class and settings, for keys of what it draws: the same in every process, and as text, since some
    have an infinite setting, which JSON cannot hold.
    """
    # its private settings list which others are defaults, in an order that differs from process to process
    settings = {name: repr(value) for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    return {"scheduler": type(pipe.scheduler).__name__, "scheduler_config": dict(sorted(settings.items()))}


def digest(pipe: "DiffusionPipeline", *parts: str) -> str:
    """Twelve hex digits that change when any module of ``pipe`` (of those named, if any are) does: a hash over every
    tensor's name, shape and 64 evenly spaced fp32 values. It keys caches; it is no proof against forgery.
    """
    import torch

    found = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module) and (not parts or part in parts):
            for name, tensor in module.state_dict().items():
                whole = tensor.detach()
                flat = (whole.dequantize() if is_quantized(whole) and whole.is_floating_point() else whole).flatten()
                picked = flat[torch.linspace(0, len(flat) - 1, min(64, len(flat)), dtype=torch.float64).long()]
                found.update(f"{part}.{name}{tuple(tensor.shape)}".encode() + picked.float().cpu().numpy().tobytes())
    return found.hexdigest()[:12]
