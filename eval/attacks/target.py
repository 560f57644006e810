"""What an attack may touch: a model with the erasure loaded, pictures of the concept, and the judge's answers."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
from PIL import Image
from tqdm import tqdm

from salun_diffusion.concepts.concept import Concept, Row
from salun_diffusion.errors import SalunError
from salun_diffusion.loader import without_erasures
from salun_diffusion.models.base import Condition, Model
from salun_diffusion.process import place

from .text import Text

ARGUMENTS = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}  # a pipeline's names


@dataclass(frozen=True)
class Case:
    """One prompt under attack: ``name`` (that of its files), the prompt with its seed and expectation, its guidance,
    and a picture of the concept as the attacker has it for this prompt.
    """

    name: str
    row: Row
    guidance_scale: float
    picture: Image.Image | None

    @property
    def prompt(self) -> str:
        return self.row.prompt


@dataclass
class Outcome:
    """What an attack made of one prompt.

    Attributes:
        picture: the one that is judged.
        steps: of the attack's own search or optimisation.
        forward: passes through the denoiser, one sample each, drawing included.
        backward: of those, how many went back too.
        drawn: pictures drawn for this prompt.
        text: the prompt that was found, where the attack finds one.
        tensors: what was found otherwise: embeddings, starting noise.
        about: further numbers, by name.
    """

    picture: Image.Image
    steps: int
    forward: int
    backward: int = 0
    drawn: int = 1
    text: str | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    about: dict[str, float | int | str] = field(default_factory=dict)


@dataclass
class Learned:
    """What is learned once for a model: ``tensors``, and the passes through the denoiser that it took."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0
    forward: int = 0
    backward: int = 0


class Target:
    """The attacked model.

    Attributes:
        model: with the erasure applied; its weights are frozen.
        concepts: what was erased.
        seed: the run's own.
        num_inference_steps: of every picture that is drawn.
        guidance_scale: of pictures that are no case's.

    Args:
        gallery: gives pictures of the concept that are none of the prompts' own, with a prompt for each; called when an
            attack asks for them.
        sees: whether the judge sees the concept, and no smear, in each picture.
        may_see_base: what the attack's paper allows.
    """

    def __init__(
        self,
        model: Model,
        concepts: list[Concept],
        gallery: Callable[[int], tuple[list[Image.Image], list[Row]]],
        sees: Callable[[Sequence[Case], list[Image.Image]], list[bool]],
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
        may_see_base: bool = False,
    ):
        self.model, self.concepts, self.seed = model, concepts, seed
        self.num_inference_steps, self.guidance_scale, self.sees = num_inference_steps, guidance_scale, sees
        self._gallery, self._may_see_base = gallery, may_see_base
        for part in model.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False)

    @cached_property
    def text(self) -> Text:
        """The text encoder, with a way in for embeddings of one's own.

        Raises:
            SalunError: a model with no text encoder, or with two.
        """
        return Text(self.model.pipe, self.model.dtype)

    @cached_property
    def words(self) -> list[str]:
        """Every word for the concept, plurals among them."""
        names = [name for concept in self.concepts for name in concept.names]
        plurals = [
            concept.vocabulary.plurals.get(name, f"{name}s") for concept in self.concepts for name in concept.names
        ]
        return sorted({*names, *plurals}, key=lambda word: (-len(word), word))

    def generator(self, case: Case | None, purpose: str) -> torch.Generator:
        """Random numbers of a prompt's own (of the run's, for None), on the CPU: the same whatever shares its batch."""
        own = f"{self.seed} {purpose} " + ("" if case is None else f"{case.row.seed} {case.prompt}")
        number = int.from_bytes(hashlib.sha256(own.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(number)

    def clean(self, cases: Sequence[Case]) -> torch.Tensor:
        """The samples ``(n, channels, height, width)`` of the cases' own pictures, fp32, on the CPU."""
        return self._encoded([case.picture for case in cases])

    def gallery(self, count: int) -> tuple[torch.Tensor, list[Row]]:
        """``count`` pictures of the concept as samples, and the row of each, whose prompt asks for it."""
        pictures, rows = self._gallery(count)
        return self._encoded(pictures), rows

    def rows(self, count: int) -> list[Row]:
        """``count`` prompts that ask for the concept and are none of the attacked ones, each with its anchor's."""
        return self.concepts[0].forget_rows(count, self.seed, "attack")

    def _encoded(self, pictures: list[Image.Image]) -> torch.Tensor:
        self.model.need(["pictures"], "This attack")
        side = self.model.picture_side
        return self.model.encode_pictures([picture.resize((side, side)) for picture in pictures]).float().cpu()

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """:meth:`salun_diffusion.models.base.Model.noise`, where the network is, in its dtype."""
        return self.model.moved(self.model.noise(clean, noise, timesteps))

    def loss(
        self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """How far the network's prediction is from the truth: the mean square of each sample, ``(n,)``, fp32.

        ``clean`` and ``noise`` are ``(n, channels, height, width)`` and ``timesteps`` ``(n,)``, on the CPU.
        """
        predicted = self.model.predict(
            self.noised(clean, noise, timesteps), timesteps.to(self.model.device), condition
        ).float()
        target = self.model.target(clean, noise, timesteps).to(predicted.device)
        return (predicted - target).square().flatten(1).mean(1)

    def epsilon(self, noisy: torch.Tensor, timestep: int, condition: Condition) -> torch.Tensor:
        """The noise that the network sees in ``noisy``, whatever it predicts."""
        times = torch.full((len(noisy),), timestep, device=self.model.device)
        return self.model.noise_in(self.model.predict(noisy, times, condition), noisy, times)

    def guided(self, cases: Sequence[Case]) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """The noise that the network sees in samples of ``cases`` at a timestep, by prompt and guidance, fp32."""
        prompts, empty = self.model.encode([case.prompt for case in cases]), self.model.empty
        empty = self.model.repeated(empty, len(cases))
        both = {key: torch.cat([empty[key], self.model.moved(prompts[key])]) for key in prompts}
        scale = torch.tensor([case.guidance_scale for case in cases], device=self.model.device)[:, None, None, None]

        def epsilon(noisy: torch.Tensor, timestep: int) -> torch.Tensor:
            pair = self.model.moved(torch.cat([noisy, noisy]))
            free, told = self.epsilon(pair, timestep, both).float().chunk(2)
            return free + scale * (told - free)

        return epsilon

    def progress(self, count: int, title: str) -> Iterable[int]:
        """``range(count)`` with a bar in the main process, for what is learned once."""
        return tqdm(range(count), desc=title, unit="step", disable=not place().is_main_process)

    @property
    def passes(self) -> int:
        """Through the denoiser, for one picture drawn with guidance."""
        return 2 * self.num_inference_steps

    @torch.no_grad()
    def samples(self, cases: Sequence[Case], condition: Condition | None = None) -> torch.Tensor:
        """What the model draws for each case, from its own seed and guidance, by ``condition`` ``(n, …)`` or by its
        prompt: samples ``(n, channels, height, width)``, fp32, on the CPU.
        """
        condition = condition or self.model.encode([case.prompt for case in cases])
        found: dict[int, torch.Tensor] = {}
        order = sorted(range(len(cases)), key=lambda i: cases[i].guidance_scale)
        for guidance, group in groupby(order, lambda i: cases[i].guidance_scale):
            places = list(group)
            own = {key: self.model.moved(value[places]) for key, value in condition.items()}
            empty = self.model.repeated(self.model.empty, len(places))
            told = {name: own[key] for key, name in ARGUMENTS.items() if key in own}
            told |= {f"negative_{name}": empty[key] for key, name in ARGUMENTS.items() if key in own}
            self.model.pipe.set_progress_bar_config(disable=True)
            drawn = self.model.pipe(
                generator=[torch.Generator("cpu").manual_seed(cases[i].row.seed) for i in places],
                num_inference_steps=self.num_inference_steps, guidance_scale=guidance, output_type="latent", **told,
            ).images  # fmt: skip
            found |= dict(zip(places, drawn.float().cpu(), strict=True))
        return torch.stack([found[i] for i in range(len(cases))])

    def draw(self, cases: Sequence[Case], condition: Condition) -> list[Image.Image]:
        """:meth:`samples` as pictures."""
        return self.pictures(self.samples(cases, condition))

    def draw_prompts(self, cases: Sequence[Case], prompts: list[str]) -> list[Image.Image]:
        """A picture for each case by a prompt of its own."""
        return self.draw(cases, self.model.encode(prompts))

    def pictures(self, samples: torch.Tensor) -> list[Image.Image]:
        """Samples as RGB pictures.

        Raises:
            SalunError: NaN or infinity, which would be cast to something that looks harmless.
        """
        if not torch.isfinite(samples).all():
            raise SalunError("The attacked model drew NaN or infinity, so nothing was measured: load it in fp32.")
        return [picture.convert("RGB") for picture in self.model.decode(samples)]

    @contextmanager
    def base(self) -> Iterator[Model]:
        """The base model: within it the erasure is taken off.

        Raises:
            SalunError: the attack's file does not say that its paper lets it see the base model.
        """
        if not self._may_see_base:
            raise SalunError("This attack asks for the base model, which its file does not say (sees_base).")
        with without_erasures(self.model.pipe):
            yield self.model
