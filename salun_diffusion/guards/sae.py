"""The k-sparse autoencoder (Makhzani & Frey, 2013) of the guards that have one, and its training."""

import torch
from torch.nn.functional import mse_loss


class SparseAutoencoder(torch.nn.Module):
    """``x ≈ D top-k(E (x − b) + c) + b``, its decoder tied to the encoder at the start, with columns of length one.

    Args:
        width: of x.
        count: of latents.
        active: latents that may be other than 0, k.
        of_batch: k for each row on average, k · rows among all of a batch (BatchTopK), in place of k in every row.
    """

    def __init__(self, width: int, count: int, active: int, of_batch: bool = False):
        super().__init__()
        encoder = torch.nn.Linear(width, count).weight.detach()
        self.encoder = torch.nn.Parameter(encoder)
        self.decoder = torch.nn.Parameter((encoder / encoder.norm(dim=1, keepdim=True)).T.contiguous())
        self.bias, self.latent_bias = (torch.nn.Parameter(torch.zeros(size)) for size in (width, count))
        self.active, self.of_batch = min(active, count), of_batch

    def latents(self, x: torch.Tensor) -> torch.Tensor:
        """Before top-k and ReLU, ``(…, count)``."""
        return (x - self.bias) @ self.encoder.T + self.latent_bias

    def least(self, latents: torch.Tensor) -> torch.Tensor:
        """The least that is kept of a batch's ``latents`` ``(rows, count)``, 0 where fewer are above it; a scalar."""
        return latents.flatten().topk(self.active * len(latents)).values[-1].relu()

    def forward(self, x):
        latents = self.latents(x)
        if self.of_batch:
            sparse = torch.where(latents >= self.least(latents), latents.relu(), 0.0)
        else:
            values, places = latents.topk(self.active, dim=-1)
            sparse = torch.zeros_like(latents).scatter(-1, places, values.relu())
        return sparse @ self.decoder.T + self.bias

    @torch.no_grad()
    def unit(self) -> None:
        """Bring the decoder's columns to length one."""
        self.decoder /= self.decoder.norm(dim=0, keepdim=True)


def train(autoencoder: SparseAutoencoder, x: torch.Tensor, steps: int, rate: float, batch: int, falling=False) -> None:
    """Train on the rows of ``x`` ``(rows, width)``, by Adam, drawn with torch's own generator of the CPU.

    Args:
        autoencoder: wherever it is; the batches are brought there.
        x: float32.
        steps: of the training.
        rate: learning rate.
        batch: rows in a batch, drawn with replacement.
        falling: the rate falls to 0 linearly, and the decoder's columns are of length one all along.
    """
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=rate)
    for step in range(steps):
        if falling:
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        given = x[torch.randint(len(x), (batch,))].to(autoencoder.bias)
        optimizer.zero_grad()
        mse_loss(autoencoder(given), given).backward()
        optimizer.step()
        if falling:
            autoencoder.unit()
