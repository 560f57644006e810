"""What the rest of the house may ask of a base model: one class a family, in a file of its own.

A *condition* is whatever the network is told besides the noisy sample: prompt embeddings for one family, a class label
for another. It is a flat dictionary of tensors that share their first dimension, so that it can be indexed, joined,
repeated and moved without being understood; only its own family looks inside. A prompt is the text that stands for a
condition in prompt lists, files and tables.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline

from ..errors import SalunError
from .load import component, denoiser
from .sampling import sample
from .scopes import TEXT_ENCODER, UNET

if TYPE_CHECKING:
    from PIL import Image

    from ..concepts.concept import Row
    from ..concepts.templates import Vocabulary

Condition = dict[str, torch.Tensor]

CAPABILITIES = {  # what a method or a measure may need, and how its lack is told
    "text": "encodes prompts as sequences of tokens",
    "cross-attention": "attends to the tokens of a prompt in layers of its own, called attn2",
    "embeddings": "is told a prompt by its tokens' embeddings",
    "words": "takes a word of one's own by its token's embedding, as CLIP's encoders do",
    "one text encoder": "reads prompts by one text encoder alone",
    "identities": "is told whom to draw by the vector of a face, as Arc2Face is",
    "pictures": "encodes pictures as samples",
    "diffusion": "was trained on a diffusion's noise schedule, and not as a flow",
}


class Model:
    """A base model: its pipeline, the network to be edited, and how samples are noised, predicted, drawn and shown.

    Attributes:
        pipe: the diffusers pipeline; nothing outside this seam looks for its parts.
        network: the denoiser.
        edited: the network that an erasure trains: the denoiser, unless :meth:`edit` says otherwise.
        schedule: the noise schedule of training.
        autocast: makes the context that :meth:`predict` runs in; the trainer puts accelerate's here.
    """

    capabilities: frozenset[str] = frozenset({"diffusion"})
    vocabulary: "Vocabulary | None" = None  # of a family whose conditions are names from a list
    Schedule: type = DDPMScheduler
    scopes: dict[str, str] = UNET  # what the names of scopes stand for in its network

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe, self.network = pipe, denoiser(pipe)
        self.edited: torch.nn.Module = self.network
        self.schedule = self.schedule_of(pipe.scheduler.config)
        self.autocast: Any = nullcontext

    @classmethod
    def accepts(cls, pipe: DiffusionPipeline) -> bool:
        """Whether ``pipe`` is of this family."""
        raise NotImplementedError

    @classmethod
    def schedule_of(cls, config: dict) -> Any:
        """The noise schedule of training, of the config of the pipeline's scheduler."""
        return cls.Schedule.from_config(config)

    def need(self, capabilities: Sequence[str], by: str) -> None:
        """Pass if the model has all ``capabilities``.

        Args:
            capabilities: names of ``CAPABILITIES``.
            by: who needs them, for the message, such as "--method uce".

        Raises:
            SalunError: one is missing.
        """
        for name in capabilities:
            if name not in self.capabilities:
                able = ", ".join(sorted(self.capabilities)) or "none of those that are asked for"
                raise SalunError(
                    f"{by} needs a base model that {CAPABILITIES[name]} ({name}), which {type(self.pipe).__name__} "
                    f"does not (it has: {able}): choose another method or model."
                )

    def edit(self, name: str | None) -> None:
        """Make the pipeline's network ``name`` the one that is edited, in place of the denoiser (None).

        The denoiser then asks for no gradients of its own: they only pass through it.

        Raises:
            SalunError: the pipeline has none of that name.
        """
        self.edited = component(self.pipe, name)
        if self.edited is not self.network:
            self.scopes = TEXT_ENCODER
            self.network.requires_grad_(False)

    def check_guided(self, by: str) -> None:
        """Pass if there is an unconditional side, :attr:`empty`, to guide from.

        Args:
            by: who needs it, for the message, such as "--guidance_scale 3".

        Raises:
            SalunError: there is none.
        """

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of what the network denoises, at the model's own size."""
        config = self.network.config
        return config.in_channels, config.sample_size, config.sample_size

    def encode(self, prompts: list[str]) -> Condition:
        """The conditions of ``prompts``, ``(len(prompts), …)`` each, on the CPU.

        Raises:
            SalunError: a prompt that the model does not know.
        """
        raise NotImplementedError

    @cached_property
    def empty(self) -> Condition:
        """The unconditional side of classifier-free guidance, a batch of one."""
        raise NotImplementedError

    def repeated(self, condition: Condition, count: int) -> Condition:
        """A condition of one for a batch of ``count``, where the network is."""
        return {key: self.moved(value).expand(count, *value.shape[1:]) for key, value in condition.items()}

    def moved(self, value: torch.Tensor) -> torch.Tensor:
        """A part of a condition where the network is, in its dtype unless it holds integers."""
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The network's own call, without the autocast of :meth:`predict`."""
        raise NotImplementedError

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        """What the network predicts, of ``noisy``'s shape ``(batch, channels, height, width)``.

        Args:
            noisy: noised samples.
            timesteps: integers ``(batch,)``; of a flow, floats.
            condition: of the same batch.
        """
        with self.autocast():
            return self.forward(noisy, timesteps, condition)

    def times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """``count`` timesteps to train at, on the CPU: integers, all alike likely."""
        return torch.randint(self.schedule.config.num_train_timesteps, (count,), generator=generator)

    def sampler(self, num_inference_steps: int):
        """A deterministic sampler, for methods that denoise themselves: diffusers' DDIM, its timesteps set."""
        config = self.pipe.scheduler.config
        # by default DDIM would clip to [-1, 1], which latents go beyond; a model of pixels says that it clips
        sampler = DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))
        sampler.set_timesteps(num_inference_steps)
        return sampler

    def noise(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """``clean`` with ``noise`` as it is at ``timesteps``, all on the CPU (Ho et al. 2020, eq. 4)."""
        return self.schedule.add_noise(clean, noise, timesteps)

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What a perfect network predicts for that: the noise, or the velocity (Salimans & Ho 2022).

        Raises:
            SalunError: any other prediction type.
        """
        kind = self.schedule.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.schedule.get_velocity(clean, noise, timesteps)
        raise SalunError(f"The scheduler's prediction_type is '{kind}': epsilon and v_prediction can be trained.")

    def noise_in(self, predicted: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The noise in ``noisy`` as what the network ``predicted`` for it tells, of the same shape."""
        if self.schedule.config.prediction_type == "epsilon":
            return predicted
        alpha = self.schedule.alphas_cumprod.to(noisy.device)[timesteps].view(-1, *[1] * (noisy.ndim - 1))
        return alpha.sqrt() * predicted + (1 - alpha).sqrt() * noisy

    def draw(self, rows: "Sequence[Row]", **how) -> list:
        """One picture (or latent) for each row, from its own seed; ``how`` is as for :func:`.sampling.sample`."""
        return sample(self.pipe, rows, **how)

    def decode(self, samples: torch.Tensor) -> "list[Image.Image]":
        """Samples ``(n, channels, height, width)`` as :meth:`draw` leaves them, as pictures."""
        raise NotImplementedError

    def encode_pictures(self, pictures: "list[Image.Image]") -> torch.Tensor:
        """Square RGB pictures of :attr:`picture_side` pixels, as samples ``(n, channels, height, width)``."""
        raise NotImplementedError

    @property
    def picture_side(self) -> int:
        """Pixels of a picture's side at the model's own size."""
        return self.network.config.sample_size

    def move_others(self, device: torch.device | str) -> None:
        """Move every module but the network and the one that is edited to ``device``: the rest has nothing to do while
        these train.
        """
        for module in self.pipe.components.values():
            if isinstance(module, torch.nn.Module) and module not in (self.network, self.edited):
                module.to(device)

    def drop_encoders(self) -> None:
        """Free the text encoders, which may be as large as the network. Nothing can be encoded from here on but the
        empty prompt, whose condition is kept.
        """
        if names := [name for name in self.pipe.components if name.startswith("text_encoder")]:
            self.empty  # noqa: B018
            self.pipe.register_modules(**dict.fromkeys(names))
