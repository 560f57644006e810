"""Models that are told whom to draw by a face's vector: Arc2Face (Papantoniou et al., "Arc2Face: a foundation model for
ID-consistent human faces", ECCV 2024), which is Stable Diffusion 1.5 with a text encoder of its own, and small ones of
that form.

The prompt is always ``PROMPT``. Before the text encoder runs, the vector of a face (ArcFace's 512 numbers, of length
one) takes the place of the embedding of one token, filled up with zeros to the encoder's width: of ``PLACE`` here,
where Arc2Face's own prompt has "id". What the network is told is what the encoder then gives.

Who is who stands beside the model in ``identities.safetensors``: for each person, by name, some vectors ``(n, width)``.
Its ``concepts.json`` has the same names as the words of a slot.
"""

import difflib
from pathlib import Path

import torch
import torch.nn.functional as F

from ..errors import SalunError
from ..files import listed
from ..tensors import read_safetensors
from .base import Condition
from .text_unet import PLACE, TextUNet, text_encoders

FILE = "identities.safetensors"
PROMPT = f"photo of a {PLACE} person"


class Identities(TextUNet):
    """A Stable Diffusion pipeline of one text encoder from a folder with an ``identities.safetensors``; a prompt is a
    name in that file, and stands for the mean of the person's vectors.

    Attributes:
        people: each person's vectors, of length one, fp32 ``(n, width)``, by name.
    """

    capabilities = frozenset({"identities", "pictures", "diffusion"})

    def __init__(self, pipe):
        super().__init__(pipe)
        self.capabilities = Identities.capabilities  # it reads no text
        self.people = read_people(Path(pipe.name_or_path) / FILE, self.width)
        self.names = {name.lower(): name for name in self.people}

    @classmethod
    def accepts(cls, pipe):
        if not super().accepts(pipe) or len(text_encoders(pipe)) != 1:
            return False
        folder = getattr(pipe, "name_or_path", None)
        return bool(folder) and (Path(folder) / FILE).is_file()

    @property
    def width(self) -> int:
        """The numbers of a token's embedding, which no vector may exceed."""
        return self.pipe.text_encoder.config.hidden_size

    def person(self, prompt: str) -> str:
        """The name that ``prompt`` is, in the file's own spelling.

        Raises:
            SalunError: nobody has it.
        """
        if prompt.lower() not in self.names:
            close = difflib.get_close_matches(prompt.lower(), self.names, 1, 0.0)
            raise SalunError(
                f"The model knows nobody called '{prompt}'. Did you mean '{self.names[close[0]]}'? Its "
                f"{len(self.names)} people: {listed(self.people, 20)}."
            )
        return self.names[prompt.lower()]

    def centroid(self, name: str) -> torch.Tensor:
        """The mean of a person's vectors, of length one again, fp32 ``(width,)``."""
        return F.normalize(self.people[name].mean(0), dim=0)

    def encode(self, prompts):
        names = {prompt: self.person(prompt) for prompt in prompts if prompt}
        nobody = torch.zeros(next(iter(self.people.values())).shape[1])  # the empty prompt, put in below
        vectors = [self.centroid(names[prompt]) if prompt else nobody for prompt in prompts]
        found = self.encode_vectors(torch.stack(vectors)) if names else self.repeated(self.empty, len(prompts))
        left_out = torch.tensor([not prompt for prompt in prompts])
        return {
            key: torch.where(left_out.view(-1, 1, 1), self.empty[key].to(value.dtype).cpu(), value.cpu())
            for key, value in found.items()
        }

    @torch.no_grad()
    def encode_vectors(self, vectors: torch.Tensor) -> Condition:
        """The conditions of faces' ``vectors`` ``(n, width)``, where the network is."""
        whole = F.pad(vectors, (0, self.width - vectors.shape[1]))
        parts = [self.encode_words([PROMPT] * len(part), [part]) for part in whole.split(64)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def draw(self, rows, **how):
        return super().draw(rows, tell=self._told, **how)

    def _told(self, prompts: list[str]) -> dict:
        """What the pipeline's call is given for ``prompts``: it would read a name as text."""
        hidden = self.encode(prompts)["encoder_hidden_states"]
        empty = self.repeated(self.empty, len(prompts))["encoder_hidden_states"]
        return {"prompt_embeds": self.moved(hidden), "negative_prompt_embeds": empty}


def read_people(path: Path, width: int) -> dict[str, torch.Tensor]:
    """The vectors in an ``identities.safetensors``, made of length one, fp32, by name.

    Raises:
        SalunError: a file that is damaged, or holds something else: the vectors of a person must be ``(n, numbers)``,
            none of them 0, with as many numbers for everyone and no more than ``width``.
    """
    people = read_safetensors(path)[0]
    shapes = {value.shape[1:] for value in people.values()}
    whole = all(value.dim() == 2 and len(value) and value.is_floating_point() for value in people.values())
    if not people or not whole or len(shapes) > 1 or max(shapes)[0] > width:
        raise SalunError(
            f"{path} does not say who is who: give it for each person, by name, a tensor of vectors (n, numbers) with "
            f"as many numbers for everyone, at most the text encoder's {width}."
        )
    lengths = {name: value.float().norm(dim=1, keepdim=True) for name, value in people.items()}
    if empty := [name for name, length in lengths.items() if not length.all()]:
        raise SalunError(f"{path} has a vector of zeros for {listed(empty)}, which no face has: leave it out.")
    return {name: people[name].float() / lengths[name] for name in sorted(people)}
