"""A diffusers pipeline for class-conditional U-Nets on pixels, which diffusers itself has none for."""

import json

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from ..concepts.classes import class_aliases, class_names
from ..errors import SalunError
from .sampling import denoise


class ClassConditionalPipeline(DiffusionPipeline):
    """A ``UNet2DModel`` with class embeddings, and its scheduler.

    Args:
        unet: its ``num_class_embeds`` counts the classes, and the null class if it has one (the last).
        scheduler: any of diffusers'.
        id2label: class number → name, as ``DiTPipeline`` has it. If it names fewer classes than the U-Net embeds, the
            first that it does not name is the null class. Without it the classes are called by their numbers.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet, scheduler, id2label: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(id2label={str(key): name for key, name in id2label.items()} if id2label else None)

    @property
    def id2label(self) -> dict:
        """Class number → name."""
        return self.config.id2label or dict(enumerate(map(str, range(self.unet.config.num_class_embeds or 0))))

    @property
    def labels(self) -> dict[str, int]:
        """Name → class number; of a class of several names, each."""
        numbers = dict(zip(class_names(self.id2label), sorted(map(int, self.id2label)), strict=True))
        return numbers | {alias: numbers[name] for alias, name in class_aliases(self.id2label).items()}

    @property
    def null_class(self) -> int | None:
        """The class that stands for none, or None if the U-Net was trained without one."""
        count = len(self.id2label)
        return count if (self.unet.config.num_class_embeds or 0) > count else None

    def to_json_string(self) -> str:
        """The config as it is saved: under the name of a class that diffusers has, which opens the same two parts."""
        config = json.loads(super().to_json_string())
        return json.dumps(config | {"_class_name": "DDPMPipeline"}, indent=2, sort_keys=True) + "\n"

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Draw one picture for each class.

        Args:
            class_labels: classes, by number or by name.
            guidance_scale: above 1, classifier-free guidance from the null class; 3 unless given, 1 without a null
                class.
            generator: one for all pictures, or one for each.
            num_inference_steps: denoising steps.
            output_type: "pil", "np" or "latent" (the samples themselves, a tensor).
            return_dict: False returns a tuple.

        Raises:
            SalunError: a class that the model does not have, or guidance without a null class.
        """
        wanted = class_labels if isinstance(class_labels, list | tuple) else [class_labels]
        labels = self.labels
        if unknown := [one for one in wanted if one not in labels and one not in labels.values()]:
            raise SalunError(f"The model has no class {unknown[0]!r}: its classes are {', '.join(labels)}.")
        numbers = torch.tensor([labels.get(one, one) for one in wanted], device=self.device)
        scale = (1.0 if self.null_class is None else 3.0) if guidance_scale is None else guidance_scale
        if scale > 1 and self.null_class is None:
            raise SalunError(f"guidance_scale is {scale:g}, but the model has no null class to guide from: give 1.")
        generators = generator if isinstance(generator, list) else [generator] * len(wanted)
        size, null = self.unet.config.sample_size, torch.full_like(numbers, self.null_class or 0)
        shape = (self.unet.config.in_channels, size, size)
        drawn = [torch.randn(shape, generator=one, device=one.device if one else "cpu") for one in generators]
        noise = torch.stack([one.cpu() for one in drawn])

        def predict(x, t, which):
            return self.unet(x, t, which["class_labels"], return_dict=False)[0]

        samples = denoise(
            predict, self.scheduler, noise.to(self.device, self.unet.dtype), {"class_labels": numbers},
            {"class_labels": null}, guidance_scale=scale, num_inference_steps=num_inference_steps,
            generators=generators,
        )  # fmt: skip
        images = samples if output_type == "latent" else pixels(samples)
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def pixels(samples: torch.Tensor):
    """Samples in −1…1, ``(n, 1 or 3, height, width)`` → RGB in 0…1, an array ``(n, height, width, 3)``."""
    rgb = samples.float().expand(-1, 3, -1, -1) if samples.shape[1] == 1 else samples.float()
    return (rgb / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
