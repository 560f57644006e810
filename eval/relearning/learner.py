"""A network that is fine-tuned on pictures and their prompts, and put back as it was.

Relearning is [rebuild]: later works fine-tune an erased model for 5 to 500 steps on pictures of the concept and judge
what it draws; no code of theirs was at hand. Here: the model's own training loss, torch's Adam, on all weights, on the
cross-attention alone, or on a low-rank adapter that peft makes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import reduce
from PIL import Image

from salun_diffusion.data.sets import ImageSet, batches
from salun_diffusion.errors import SalunError
from salun_diffusion.masks.scope import scoped_parameters
from salun_diffusion.methods.losses import denoising
from salun_diffusion.models.base import Model
from salun_diffusion.process import place, progress
from salun_diffusion.tensors import read_safetensors, write_safetensors
from salun_diffusion.training.batches import Batches

SCOPES = {"full": "all", "attn2": "cross-attention"}  # ours → the library's; the third, lora, adds weights
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # the layers of every attention that a LoRA goes onto
ADAPTER = "relearning"  # its name among the network's
MOMENTS = ("exp_avg", "exp_avg_sq")
FORMAT = "salun-relearning 1"


def learned_set(model: Model, pictures: list[Image.Image], prompts: list[str]) -> ImageSet:
    """Square pictures of ``model``'s own size as latents in fp32, each with its prompt's condition."""
    distinct = list(dict.fromkeys(prompts))
    latents = model.encode_pictures(pictures).float().cpu()
    index = torch.tensor([distinct.index(prompt) for prompt in prompts])
    return ImageSet(latents, distinct, index, None, model.encode(distinct))


class Learner:
    """The weights that are trained, Adam, and how many steps were done. Made by :func:`fine_tuned`.

    Args:
        model: whose network is trained, in fp32.
        parameters: name → weight of the network, those that move.
        learned: what it learns from.
        learning_rate: Adam's.
        batch_size: pictures of a step, of all processes together.
        at_once: pictures that pass through the network at once, at most.
        seed: of the order of the pictures, their noise and their timesteps.
    """

    def __init__(
        self,
        model: Model,
        parameters: dict[str, torch.nn.Parameter],
        learned: ImageSet,
        learning_rate: float,
        batch_size: int,
        at_once: int,
        seed: int,
    ):
        self.model, self.parameters, self.learned = model, parameters, learned
        self.state = place()
        self.batches = Batches(self.state, model, {}, seed, at_once, 0, "")
        self.order = batches(len(learned), batch_size, seed)
        self.adam = torch.optim.Adam(parameters.values(), lr=learning_rate)
        self.done = 0

    @torch.enable_grad()
    def step(self) -> float:
        """One step of Adam on the denoising loss (Ho et al. 2020, eq. 14) of one batch; returns the loss.

        Raises:
            SalunError: it is not finite.
        """
        index, loss = next(self.order), torch.zeros((), device=self.model.device)
        for batch in self.batches.micro_batches(self.learned, index, "relearn", self.done):
            predicted = self.model.predict(batch.noisy, batch.timesteps, batch.condition)
            part = denoising(predicted, batch.target) * (len(batch.noisy) / len(index))
            part.backward()
            loss += part.detach()
        for weight in self.parameters.values():
            weight.grad = reduce(weight.grad, "sum")  # over the processes, which share each batch
        loss = reduce(loss, "sum").item()
        if not loss < float("inf"):
            raise SalunError(f"The loss is not finite at step {self.done + 1}: give a lower --learning_rate.")
        self.adam.step()
        self.adam.zero_grad()
        self.done += 1
        return loss

    def train_to(self, step: int, title: str) -> None:
        """Go on until ``step`` steps are done."""
        todo = range(self.done, step)
        for _ in progress(
            f"{title}: learning", len(todo), "step", self.state.is_main_process and bool(todo), over=todo
        ):
            self.step()

    def save(self, path: Path, key: str) -> None:
        """Write the weights, Adam's moments and the step, atomically; ``key`` says what run they are of."""
        if self.state.is_main_process:
            tensors = {f"value.{name}": weight.detach() for name, weight in self.parameters.items()}
            for name, weight in self.parameters.items():
                tensors |= {f"{moment}.{name}": self.adam.state[weight][moment] for moment in MOMENTS}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, tensors, {"format": FORMAT, "key": key, "step": str(self.done)})
        self.state.wait_for_everyone()

    @torch.no_grad()
    def load(self, path: Path, key: str, at_most: int) -> None:
        """Go on from what :meth:`save` wrote, if it is of this run and of no later step than ``at_most``; a file of
        another run, or one that is damaged, is as good as none.
        """
        try:
            tensors, about = read_safetensors(path)
        except SalunError:
            return
        if about.get("key") != key or int(about["step"]) > at_most:
            return
        self.done = int(about["step"])
        for _ in range(self.done):
            next(self.order)
        for name, weight in self.parameters.items():
            weight.copy_(tensors[f"value.{name}"])
            moments = {moment: tensors[f"{moment}.{name}"].to(weight.device) for moment in MOMENTS}
            self.adam.state[weight] = {"step": torch.tensor(float(self.done))} | moments


@contextmanager
def fine_tuned(
    model: Model,
    learned: ImageSet,
    scope: str,
    *,
    rank: int,
    learning_rate: float,
    batch_size: int,
    at_once: int,
    seed: int,
) -> Iterator[Learner]:
    """A :class:`Learner` of ``model``, whose network is again as it was, bit for bit, afterwards.

    Args:
        model: in fp32.
        learned: as :class:`Learner` has it, and so are ``learning_rate``, ``batch_size``, ``at_once`` and ``seed``.
        learning_rate: Adam's.
        batch_size: pictures of a step.
        at_once: pictures that pass through the network at once, at most.
        rank: of the adapter.
        seed: of all that is random.
        scope: "full", "attn2", or "lora": an adapter of ``rank`` on every attention's projections, alpha = rank, A
            drawn from a Gaussian by ``seed``, B zero.

    Raises:
        SalunError: a model that is not in fp32, a batch that the processes cannot share, or no peft.
    """
    network = model.network
    if model.dtype != torch.float32:
        raise SalunError("Relearning moves the weights themselves, for which they must be in fp32: leave --dtype out.")
    if batch_size % (processes := place().num_processes):
        raise SalunError(f"--train_batch_size {batch_size} cannot be shared by {processes} processes: give a multiple.")
    wanted = [(weight, weight.requires_grad) for weight in network.parameters()]
    worn = _worn(network)
    parameters, before = _adapter(network, rank, seed, worn) if scope == "lora" else _own(network, SCOPES[scope])
    network.eval()
    try:
        yield Learner(model, parameters, learned, learning_rate, batch_size, at_once, seed)
    finally:
        if scope == "lora" and worn:
            network.delete_adapters(ADAPTER)
            _activate(network, worn)
        elif scope == "lora":
            network.unload_lora()
        for name, value in before.items():  # under an erasure's adapter the network calls its own weights otherwise
            parameters[name].data.copy_(value)
        for weight, trainable in wanted:
            weight.requires_grad_(trainable)
            weight.grad = None


def _own(network: torch.nn.Module, scope: str) -> tuple[dict, dict]:
    """The network's weights in ``scope``, and a copy of them."""
    parameters = scoped_parameters(network, scope)
    return parameters, {name: weight.detach().to("cpu", copy=True) for name, weight in parameters.items()}


def _worn(network: torch.nn.Module) -> list[str]:
    """The adapters that the network computes with, an erasure's among them."""
    active = network.active_adapters() if getattr(network, "peft_config", None) else []
    return [active] if isinstance(active, str) else active


def _activate(network: torch.nn.Module, names: list[str]) -> None:
    """Let the network compute with these adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(names)


def _adapter(network: torch.nn.Module, rank: int, seed: int, worn: list[str]) -> tuple[dict, dict]:
    """The weights of a new low-rank adapter on ``network``, beside those ``worn``; none of its own moves."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise SalunError("--scope lora needs peft: pip install 'salun-diffusion[export]'.") from None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS)
        network.add_adapter(config, adapter_name=ADAPTER)
    _activate(network, [*worn, ADAPTER])
    found = {name: weight for name, weight in network.named_parameters() if f".{ADAPTER}." in name}
    network.requires_grad_(False)
    for weight in found.values():
        weight.requires_grad_(True)
    return found, {}
