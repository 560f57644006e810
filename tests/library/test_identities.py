"""Models that are told whom to draw by a vector, and PIU, which forgets people in them, on a tiny pipeline."""

import copy
import json
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file

from salun_diffusion import Delta, SalunError, erase, load_erasure, unload_erasure
from salun_diffusion.concepts.concept import Row
from salun_diffusion.masks.scope import scoped_parameters
from salun_diffusion.methods.piu import anchor_of, mixed
from salun_diffusion.models import load_model
from salun_diffusion.models.identities import PROMPT
from salun_diffusion.training.batches import Batches

PEOPLE = ["Ada", "Ben", "Cleo", "Dan", "Eva"]
SMALL = {
    "max_train_steps": 2, "train_batch_size": 3, "learning_rate": 1e-2, "scope": "cross-attention",
    "save_dtype": "fp32",
}  # fmt: skip


def vectors():
    """Three of 12 numbers for each, of length one."""
    generator = torch.Generator().manual_seed(1)
    return {name: F.normalize(torch.randn(3, 12, generator=generator), dim=1) for name in PEOPLE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Stable Diffusion that knows PEOPLE; its text encoder is 16 wide."""
    folder = tmp_path_factory.mktemp("people")
    tiny.build(folder)
    save_file(vectors(), folder / "identities.safetensors")
    template = {"prompt": "{person}", "expect": {"label": "{person}"}}
    (folder / "concepts.json").write_text(json.dumps({"slots": {"person": PEOPLE}, "templates": [template]}))
    return folder


def plainly(pipe, vector):
    """The hidden states of PROMPT from an encoder whose embedding of "*" is the vector, ``(1, 77, 16)``."""
    encoder = copy.deepcopy(pipe.text_encoder)
    place = pipe.tokenizer("*", add_special_tokens=False).input_ids
    assert len(place) == 1
    encoder.get_input_embeddings().weight.data[place[0]] = torch.cat([vector, torch.zeros(4)])
    ids = pipe.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return encoder(ids)[0]


def mean_of(name):
    total = vectors()[name].sum(0)
    return total / total.norm()


def test_a_name_is_the_person_s_mean_vector_in_the_prompt(folder):
    model = load_model(str(folder))
    told = model.encode(["Ada", "", "eva"])["encoder_hidden_states"]
    torch.testing.assert_close(told[:1], plainly(model.pipe, mean_of("Ada")))
    torch.testing.assert_close(told[2:], plainly(model.pipe, mean_of("Eva")))
    assert torch.equal(told[1:2], model.empty["encoder_hidden_states"])
    how = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    drawn = model.draw([Row("Ada", None, {}, 5), Row("Eva", None, {}, 5)], batch_size=2, **how)
    alone = model.pipe(prompt_embeds=told[:1], generator=torch.Generator().manual_seed(5), **how).images[0]
    torch.testing.assert_close(drawn[0], alone)
    assert not torch.allclose(drawn[0], drawn[1])


def test_piu_matches_a_plain_loop(folder, tmp_path, capsys):
    """One row at a time, with the choices of the seed, by Adam on a copy of the network."""
    run = erase(str(folder), "Ada", method="piu", output_dir=str(tmp_path / "run"), data_dir=str(tmp_path), alpha=3.0,
                method_option=["repulsion=0.5"], **SMALL)  # fmt: skip
    anchor = re.search(r"Ada is to be drawn as (\w+), at a cosine of (.+)\.\n", capsys.readouterr().out)
    assert float(anchor[2]) == pytest.approx(float(mean_of("Ada") @ mean_of(anchor[1])), abs=0.006)
    model = load_model(str(folder))
    pipe, base, net = model.pipe, copy.deepcopy(model.network), copy.deepcopy(model.network)
    seeded = Batches(Accelerator(cpu=True), model, {}, 0, 3, 0, "")
    theirs = scoped_parameters(net, "cross-attention", model.scopes)
    adam, own, kept = torch.optim.Adam(theirs.values(), lr=1e-2), vectors(), PEOPLE[1:]
    logged = [json.loads(line)["loss"] for line in (run.path / "training.jsonl").open()]
    anchor = plainly(pipe, mean_of(anchor[1]))
    for step in range(2):
        noise, times = seeded.draw(SimpleNamespace(latents=torch.zeros(1, 4, 8, 8)), 3, "forget", step)
        loss = 0.0
        for row in range(3):
            generator = seeded.generator("piu", step, row)
            shares = torch.empty(3).exponential_(generator=generator)
            mix = sum(share / shares.sum() * vector for share, vector in zip(shares, own["Ada"], strict=True))
            other = own[kept[int(torch.randint(4, (), generator=generator))]]
            other = plainly(pipe, other[int(torch.randint(3, (), generator=generator))])
            person, x, t = plainly(pipe, mix / mix.norm()), noise[row : row + 1], times[row : row + 1]
            with torch.no_grad():
                target = base(x, t, anchor).sample
                target = target - 0.5 * (base(x, t, person).sample - target)
                same = base(x, t, other).sample
            loss = loss + F.mse_loss(net(x, t, person).sample, target) / 3
            loss = loss + 3.0 * F.mse_loss(net(x, t, other).sample, same) / 3
        assert logged[step] == pytest.approx(loss.item(), rel=1e-3)
        adam.zero_grad()
        loss.backward()
        adam.step()
    load_erasure(pipe, run.path)
    found, before = dict(model.network.named_parameters()), dict(base.named_parameters())
    apart = sum(float((found[name] - p.detach()).square().sum()) for name, p in theirs.items())
    change = sum(float((before[name] - p.detach()).square().sum()) for name, p in theirs.items())
    assert apart**0.5 < 2e-3 * change**0.5


def test_the_anchor_is_one_of_those_at_the_cosine_or_the_nearest():
    circle = {str(angle): torch.tensor([angle / 100, (1 - angle**2 / 1e4) ** 0.5]) for angle in (5, 18, 19.5, 20.5, 40)}
    centroids = circle | {"x": torch.tensor([1.0, 0.0])}  # of which each cosine is its name's hundredth
    chosen = Counter(
        anchor_of(centroids, "x", list(circle), 0.2, torch.Generator().manual_seed(seed)) for seed in range(200)
    )
    assert chosen.keys() == {"19.5", "20.5"} and min(chosen.values()) > 60
    for likeness, nearest in ((0.3, "20.5"), (0.31, "40"), (0.9, "40"), (-1.0, "5")):
        assert anchor_of(centroids, "x", list(circle), likeness, torch.Generator()) == nearest


def test_a_mix_has_the_shares_of_dirichlet_s_distribution():
    """Mean 1/n and variance (n − 1) / (n² (n + 1)), n = 4; and length one."""
    generator = torch.Generator().manual_seed(0)
    mixes = torch.stack([mixed(torch.eye(4), generator) for _ in range(4000)])
    torch.testing.assert_close(mixes.norm(dim=1), torch.ones(4000))
    shares = mixes / mixes.sum(1, keepdim=True)
    assert shares.min() >= 0
    torch.testing.assert_close(shares.mean(0), torch.full((4,), 0.25), atol=0.01, rtol=0)
    torch.testing.assert_close(shares.var(0), torch.full((4,), 3 / 80), atol=0.003, rtol=0)


def test_piu_resumes_takes_a_mask_and_forgets_several(folder, tmp_path, capsys):
    how = SMALL | {"method": "piu", "data_dir": str(tmp_path / "data"), "mask": "saliency", "density": 0.25,
                   "num_forget_images": 4, "num_inference_steps": 2, "checkpointing_steps": 1}  # fmt: skip
    run = erase(str(folder), ["Ada", "Ben"], output_dir=str(tmp_path / "run"), **how)
    told = capsys.readouterr().out
    assert "Ada is to be drawn as " in told and "Ben is to be drawn as " in told
    whole = Delta.load(run.file).digest()
    shutil.rmtree(run.path / "checkpoint-2")
    again = erase(str(folder), ["Ada", "Ben"], output_dir=str(run.path), resume_from_checkpoint="latest", **how)
    assert Delta.load(again.file).digest() == whole
    pipe = load_model(str(folder)).pipe
    before = tiny.bits(pipe)
    load_erasure(pipe, run.path)
    after = tiny.bits(pipe)
    changed = [name for part, name in before if not torch.equal(before[part, name][1], after[part, name][1])]
    assert changed and all(".attn2." in name for name in changed)
    unload_erasure(pipe)
    assert tiny.same(tiny.bits(pipe), before)


def test_other_methods_forget_a_person_too(folder, tmp_path):
    few = SMALL | {"max_train_steps": 1, "num_forget_images": 4, "num_retain_images": 4, "num_inference_steps": 2}
    run = erase(str(folder), "Ada", method="salun", output_dir=str(tmp_path / "run"), data_dir=str(tmp_path), **few)
    assert json.loads((run.path / "config.json").read_text())["settings"]["anchor"] == ["Ben"]


def test_what_does_not_fit_is_refused_in_a_sentence(folder, tiny_folder, tmp_path):
    def refused(base, concept, text, **more):
        with pytest.raises(SalunError, match=text):
            erase(str(base), concept, **({"method": "piu", "output_dir": str(tmp_path / "run")} | more))

    refused(tiny_folder, "cat", r"--method piu needs a base model that is told whom to draw by the vector of a face")
    refused(folder, "Ada", r"--method uce needs a base model that encodes prompts", method="uce")
    refused(folder, "Adam", r"Unknown concept 'Adam'. Did you mean 'ada'\?")
    refused(folder, "Ada", r"--anchor means nothing to --method piu: leave it out", anchor="Ben")
    refused(folder, PEOPLE, r"The anchor of 'Ada' is 'Ben', which is to be forgotten too")
    with pytest.raises(SalunError, match=r"knows nobody called 'Evan'. Did you mean 'Eva'\? Its 5 people: Ada, Ben,"):
        load_model(str(folder)).encode(["Evan"])


@pytest.mark.parametrize("wrong", [{}, {"Ada": torch.ones(3)}, {"Ada": torch.ones(2, 17)},
                                   {"Ada": torch.ones(2, 4), "Ben": torch.ones(2, 5)}])  # fmt: skip
def test_a_file_that_does_not_say_who_is_who_is_refused(wrong, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    save_file(wrong, tmp_path / "base" / "identities.safetensors")
    with pytest.raises(SalunError, match="does not say who is who: give it for each person, by name, a tensor"):
        load_model(str(tmp_path / "base"))
