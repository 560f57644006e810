"""Class-conditional models: a U-Net on pixels (``UNet2DModel``), and DiT on latents.

Their condition is ``class_labels``, int64 ``(batch,)``; a prompt is the name of a class. Both may have a null class,
which guidance starts from: for DiT the one after the last, for a U-Net one that it embeds and no label names. Weights
are unlearned as the folder has them; published models' are the moving average (EMA) of their training.

Networks are in eval mode throughout (:class:`salun_diffusion.training.trainer.Trainer`): neither dropout nor the
classes that DiT would leave out by itself differ between a step's two predictions. The published code leaves both on.
"""

import difflib
from functools import cached_property

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from PIL import Image
from tqdm import tqdm

from ..concepts.classes import class_aliases, class_names, class_vocabulary
from ..errors import SalunError
from ..files import listed
from .base import Model
from .class_pipeline import pixels
from .load import denoiser
from .sampling import denoise


class Labels(Model):
    """What both have in common.

    Attributes:
        names: each class's name, by its number.
        null_class: the number of the null class, or None.
    """

    capabilities = frozenset({"pictures", "diffusion"})
    default_guidance = 3.0

    def __init__(self, pipe):
        super().__init__(pipe)
        id2label = self.id2label()
        self.names, aliases = class_names(id2label), class_aliases(id2label)
        self.null_class = self.null_class_of(len(self.names))
        self.numbers = {name.lower(): number for number, name in enumerate(self.names)}
        self.numbers = {alias.lower(): self.numbers[name.lower()] for alias, name in aliases.items()} | self.numbers
        self.vocabulary = class_vocabulary(id2label, self.null_class is not None, self.default_guidance)

    def id2label(self) -> dict:
        """Class number → names, from 0 without a gap."""
        raise NotImplementedError

    def null_class_of(self, count: int) -> int | None:
        """The null class of a model of ``count`` classes."""
        raise NotImplementedError

    def encode(self, prompts):
        for prompt in prompts:
            if prompt.lower() not in self.numbers:
                close = difflib.get_close_matches(prompt.lower(), self.numbers, 1, 0.0)
                raise SalunError(
                    f"The model has no class '{prompt}'. Did you mean '{close[0]}'? Its {len(self.names)} classes: "
                    f"{listed(self.names, 20)}."
                )
        return {"class_labels": torch.tensor([self.numbers[prompt.lower()] for prompt in prompts])}

    def check_guided(self, by):
        if self.null_class is None:
            raise SalunError(
                f"{by} needs a null class, and this model has none (its {len(self.names)} classes are all that it "
                "embeds): draw and score it without guidance (--guidance_scale 1 --saliency_guidance 1), by a method "
                "that needs none."
            )

    @cached_property
    def empty(self):
        self.check_guided("Guidance")
        return {"class_labels": torch.tensor([self.null_class])}

    @torch.no_grad()
    def draw(
        self, rows, *, num_inference_steps, guidance_scale, batch_size, output_type="pil", size=None, progress=None,
        bar=None,
    ):  # fmt: skip
        if size and tuple(size) != (self.picture_side, self.picture_side):
            raise SalunError(f"This model draws {self.picture_side} px squares alone, not {size[0]} by {size[1]}.")
        made, own = [], tqdm(total=len(rows), desc=progress, unit="image", disable=progress is None or bar is not None)
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            generators = [torch.Generator().manual_seed(row.seed) for row in part]
            noise = torch.stack([torch.randn(self.sample_shape, generator=one) for one in generators])
            condition = {key: self.moved(value) for key, value in self.encode([row.prompt for row in part]).items()}
            empty = self.repeated(self.empty, len(part)) if guidance_scale > 1 else None
            samples = denoise(
                self.predict, self.pipe.scheduler, noise.to(self.device, self.dtype), condition, empty,
                guidance_scale=guidance_scale, num_inference_steps=num_inference_steps, generators=generators,
            )  # fmt: skip
            if output_type == "latent":
                made += list(samples.cpu())
            else:
                made += self.decode(samples) if output_type == "pil" else list(self.pixels(samples))
            (own if bar is None else bar).update(len(part))
        own.close()
        return made

    def pixels(self, samples: torch.Tensor) -> np.ndarray:
        """Samples as RGB in 0…1, ``(n, height, width, 3)``."""
        raise NotImplementedError

    def decode(self, samples):
        return [Image.fromarray((picture * 255).round().astype(np.uint8)) for picture in self.pixels(samples)]


class LabelUNet(Labels):
    """A ``UNet2DModel`` with class embeddings, on grey or RGB pixels in −1…1."""

    @classmethod
    def accepts(cls, pipe):
        parts = {name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        return isinstance(denoiser(pipe), UNet2DModel) and parts == {"unet"}

    def __init__(self, pipe):
        if not pipe.unet.config.num_class_embeds:
            raise SalunError(
                "The U-Net is told no class (its config has no num_class_embeds), so no concept can be named to it: "
                "give a class-conditional model."
            )
        super().__init__(pipe)

    def id2label(self):
        count = self.network.config.num_class_embeds
        found = getattr(self.pipe, "id2label", None) or dict(enumerate(map(str, range(count))))
        if sorted(map(int, found)) != list(range(len(found))) or len(found) > count:
            raise SalunError(
                f"The model's id2label names {len(found)} classes, of {count} that its U-Net embeds: they must be "
                "numbered from 0 on without a gap, and be no more."
            )
        return found

    def null_class_of(self, count):
        return count if self.network.config.num_class_embeds > count else None

    def forward(self, noisy, timesteps, condition):
        return self.network(noisy, timesteps, condition["class_labels"], return_dict=False)[0]

    def pixels(self, samples):
        return pixels(samples)

    def encode_pictures(self, pictures):
        mode = "L" if self.network.config.in_channels == 1 else "RGB"
        arrays = [np.asarray(picture.convert(mode), dtype=np.float32) for picture in pictures]
        samples = torch.from_numpy(np.stack(arrays)) / 127.5 - 1
        return samples.unsqueeze(1) if mode == "L" else samples.permute(0, 3, 1, 2).contiguous()


class DiT(Labels):
    """Peebles & Xie, "Scalable diffusion models with transformers", ICCV 2023: diffusers' own ``DiTPipeline``."""

    default_guidance = 4.0  # that pipeline's

    @classmethod
    def accepts(cls, pipe):
        return isinstance(denoiser(pipe), DiTTransformer2DModel)

    def id2label(self):
        found: dict[int, list[str]] = {}
        if told := self.pipe.config.get("id2label"):  # put there by load_pipeline
            found = {int(number): [name] for number, name in told.items()}
        else:  # all that the pipeline itself keeps of it: of two classes of one name, the second
            for name, number in getattr(self.pipe, "labels", {}).items():
                found.setdefault(number, []).append(name)
        count = self.network.config.num_embeds_ada_norm
        return {number: ", ".join(found.get(number, [str(number)])) for number in range(count)}

    def null_class_of(self, count):
        return count

    def forward(self, noisy, timesteps, condition):
        predicted = self.network(noisy, timesteps, condition["class_labels"], return_dict=False)[0]
        return predicted[:, : noisy.shape[1]]  # the rest, if any, is the variance that the network learned

    @property
    def picture_side(self):
        return self.network.config.sample_size * 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def pixels(self, samples):
        vae = self.pipe.vae
        scaled = (samples / vae.config.scaling_factor).to(vae.device, vae.dtype)
        return pixels(torch.cat([vae.decode(one).sample.cpu() for one in scaled.split(1)]))

    @torch.no_grad()
    def encode_pictures(self, pictures):
        """The mode of what the autoencoder says of each, in the sampler's scale."""
        vae, samples = self.pipe.vae, []
        for picture in pictures:
            array = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            samples.append(vae.encode(array.to(vae.device, vae.dtype)).latent_dist.mode() * vae.config.scaling_factor)
        return torch.cat(samples)
