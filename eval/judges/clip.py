"""CLIP as a judge of how well pictures fit their prompts."""

from pathlib import Path

import torch
from transformers import CLIPModel, CLIPProcessor
from transformers.utils import cached_file

from salun_diffusion.errors import SalunError
from salun_diffusion.files import sha256


class ClipScorer:
    """A CLIP model that scores pictures against prompts.

    Raises:
        SalunError: it cannot be loaded from safetensors, or lacks weights (they would be random).
    """

    def __init__(self, source: str, device: torch.device):
        try:
            self.model, loading = CLIPModel.from_pretrained(
                source, use_safetensors=True, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
            self.processor = CLIPProcessor.from_pretrained(
                source, backend="pil", trust_remote_code=False
            )  # whatever else is installed
            folder = Path(source)
            files = sorted(folder.glob("model*.safetensors")) if folder.is_dir() else []
            self.files = files or [Path(cached_file(source, "model.safetensors"))]
            self.sha256 = sha256(*self.files)
        except Exception as error:  # transformers has no common class for a missing file, an unfit one, or no network
            raise SalunError(
                f"{source} could not be loaded as a CLIP model ({str(error).strip().splitlines()[0]}): give a folder "
                "or hub id with safetensors weights by --clip."
            ) from None
        if loading["missing_keys"]:
            raise SalunError(f"{source} lacks weights of a CLIP model ({min(loading['missing_keys'])} …).")
        self.model.eval().to(device)

    @torch.no_grad()
    def __call__(self, pictures: list, prompts: list[str]) -> list[float]:
        inputs = self.processor(text=prompts, images=pictures, return_tensors="pt", padding=True, truncation=True)
        found = self.model(**inputs.to(self.model.device))
        cosines = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        if not torch.isfinite(cosines).all():
            raise SalunError("The CLIP model answers NaN or infinity, so nothing was measured: give another by --clip.")
        return [round(value, 4) for value in (100 * cosines.clamp(min=0)).tolist()]

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """Features ``(texts, dimensions)`` of length one."""
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True).to(self.model.device)
        return torch.nn.functional.normalize(_features(self.model.get_text_features(**inputs)), dim=1)

    @torch.no_grad()
    def pictures(self, pictures: list) -> torch.Tensor:
        """Features ``(pictures, dimensions)`` of length one."""
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.model.device)
        return torch.nn.functional.normalize(_features(self.model.get_image_features(**inputs)), dim=1)

    def truncated(self, prompts: list[str]) -> int:
        limit = self.processor.tokenizer.model_max_length
        return sum(len(ids) > limit for ids in self.processor.tokenizer(prompts).input_ids)


def _features(found) -> torch.Tensor:
    """Transformers 5 wraps the features, 4 gives them as they are."""
    return getattr(found, "pooler_output", found)
