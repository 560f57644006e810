"""Train a small model of drawn faces that is told who to draw by a vector, as Arc2Face is, and its judge, from nothing.

    python -m demo.identities                         # writes demo/identities/model
    python -m demo.identities --measure runs/ada-piu  # what erasures of somebody have done

Minutes on a CPU. A killed training goes on where it was. Nobody in it is real: who somebody is, is ten random numbers,
by which a face is drawn; the vectors that stand for ArcFace's are a fixed map of these, with noise.
"""

from dataclasses import dataclass
from pathlib import Path

from salun_diffusion.options import option, run_command

HERE = Path(__file__).parent


@dataclass
class IdentitiesConfig:
    """The options of ``python -m demo.identities``."""

    work_dir: str = option("runs/identities", "checkpoints")
    output_dir: str | None = option(None, "the pipeline folder to write (default: demo/identities/model)")
    autoencoder_steps: int = option(2000, "steps of the autoencoder, of 32 faces", least=1)
    judge_steps: int = option(1500, "steps of the judge, of 64 faces", least=1)
    steps: int = option(5000, "steps of the network, of 32 faces", least=1)
    measure: list[str] = option([], "erasures to draw with and judge, beside the model: train nothing", several=True,
                                metavar="RUN")  # fmt: skip
    pictures: int = option(25, "pictures of each person that are drawn and judged", least=1)
    results: str | None = option(None, "a JSON file to write the measurements into", metavar="FILE")


def make(config: IdentitiesConfig) -> None:
    """Judge, autoencoder and network, each made unless ``work_dir`` has it; then the judge's word.

    Raises:
        SalunError: an erasure that cannot be loaded, or a file that cannot be written.
    """
    import torch

    from salun_diffusion.files import write_json
    from salun_diffusion.tables import aligned

    from . import measure

    torch.set_num_threads(1)  # of so small a network, more only get in each other's way
    folder = Path(config.output_dir or HERE / "model")
    if not config.measure:
        from . import judge, network
        from .faces import named_vectors

        work, vectors = Path(config.work_dir), named_vectors()
        centroids = torch.nn.functional.normalize(torch.stack([v.mean(0) for v in vectors.values()]), dim=1)
        seen = judge.train(work, config.judge_steps, centroids)
        vae, latents, who = network.train_autoencoder(work, config.autoencoder_steps)
        pipe = network.build(vae)
        network.train(pipe, latents, who, work, config.steps)
        network.save(pipe, seen, vectors, HERE / "concepts.json", folder)
    found = measure.measured(folder, config.measure, config.pictures)
    if config.results:
        write_json(config.results, found)
    print(aligned(measure.table(found)))


if __name__ == "__main__":
    run_command("python -m demo.identities", __doc__, IdentitiesConfig, make)
