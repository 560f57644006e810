"""The training loop against the published one, written out plainly."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler

from salun_diffusion import SalunError
from salun_diffusion.concepts.concept import Row
from salun_diffusion.config import EraseConfig
from salun_diffusion.data.sets import batches, drawn_set
from salun_diffusion.filling import fill
from salun_diffusion.masks.saliency import top_density
from salun_diffusion.masks.scope import scoped_parameters
from salun_diffusion.models import model_of
from salun_diffusion.models.load import load_pipeline
from salun_diffusion.training.change import MaskedChange
from salun_diffusion.training.checkpoints import Checkpoints
from salun_diffusion.training.optimizer import PackedAdam
from salun_diffusion.training.trainer import Trainer

FORGET = [
    Row(f"a picture of an airplane on a {c} background", f"a picture of a cat on a {c} background", {}, i)
    for i, c in enumerate(("red", "blue") * 3)
]
RETAIN = [Row(f"a photo of a {name}", None, {}, 10 + i) for i, name in enumerate(("dog", "house", "cat") * 2)]


@pytest.fixture
def setup(tiny_folder, tmp_path):
    def make(**changes):
        settings = {
            "alpha": 0.7,
            "learning_rate": 1e-3,
            "max_train_steps": 2,
            "train_batch_size": 4,
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
        }
        config = EraseConfig(concept=["airplane"], data_dir=str(tmp_path / "data"), **(settings | changes))
        fill(config, {}, "test")
        pipe = load_pipeline(str(tiny_folder))
        model, accelerator = model_of(pipe), Accelerator(cpu=True)
        forget = drawn_set(model, [FORGET], config, "forget", accelerator)
        retain = drawn_set(model, [RETAIN], config, "retain", accelerator)
        return Trainer(accelerator, model, {"forget": forget, "retain": retain}, config), pipe, config

    return make


def text(pipe, prompts):
    return pipe.encode_prompt(prompts, "cpu", 1, False)[0]


def test_saliency_matches_the_published_loss(setup):
    trainer, pipe, config = setup()
    parameters = scoped_parameters(pipe.unet, "all")
    found = trainer.saliency(parameters, torch.arange(len(FORGET)))

    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i, row in enumerate(FORGET):  # one image at a time, in place of batches
        clean = trainer.batches.sets["forget"].latents[i : i + 1]
        noise, t = trainer.batches.draw(trainer.batches.sets["forget"], 1, "saliency", i)
        noisy = schedule.add_noise(clean, noise, t)
        conditional = pipe.unet(noisy, t, text(pipe, [row.prompt])).sample
        unconditional = pipe.unet(noisy, t, text(pipe, [""])).sample
        loss = -F.mse_loss(noise, (1 + 7.5) * conditional - 7.5 * unconditional) / len(FORGET)
        for name, grad in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            total[name] += grad
    for name in parameters:
        torch.testing.assert_close(found[name], total[name].abs(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("retain_target", ["noise", "base"])
def test_steps_match_the_published_loop(retain_target, setup, tmp_path):
    """Dense Adam, gradients times mask, three passes: the reference's recipe, on the same batches and noise."""
    trainer, pipe, config = setup(retain_target=retain_target, max_train_steps=3)
    base = copy.deepcopy(pipe.unet)
    reference = copy.deepcopy(pipe.unet)
    original = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}
    parameters = scoped_parameters(pipe.unet, config.scope)
    masks = top_density({name: torch.rand_like(p) for name, p in parameters.items()}, 0.5)
    deltas = MaskedChange(parameters, masks)
    trainer.train(deltas, tmp_path / "log.jsonl", Checkpoints(tmp_path, {}, 2))

    theirs = dict(reference.named_parameters())
    adam = torch.optim.Adam([theirs[name] for name in parameters], lr=config.learning_rate)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    order, other = batches(6, 4, config.seed), batches(6, 4, config.seed + 1)
    for step in range(3):
        index = next(order)
        clean, (noise, t) = (
            trainer.batches.sets["forget"].latents[index],
            trainer.batches.draw(trainer.batches.sets["forget"], 4, "forget", step),
        )
        noisy = schedule.add_noise(clean, noise, t)
        erased = reference(noisy, t, text(pipe, [FORGET[i].prompt for i in index])).sample
        target = reference(noisy, t, text(pipe, [FORGET[i].anchor_prompt for i in index])).sample.detach()
        index = next(other)
        clean, (noise, t) = (
            trainer.batches.retain.latents[index],
            trainer.batches.draw(trainer.batches.retain, 4, "retain", step),
        )
        noisy, words = schedule.add_noise(clean, noise, t), text(pipe, [RETAIN[i].prompt for i in index])
        kept = reference(noisy, t, words).sample
        wanted = noise if retain_target == "noise" else base(noisy, t, words).sample.detach()
        loss = F.mse_loss(erased, target) + 0.7 * F.mse_loss(kept, wanted)
        adam.zero_grad()
        loss.backward()
        for name in parameters:
            theirs[name].grad *= masks[name]
        adam.step()

    moved = 0
    for name, mine in pipe.unet.named_parameters():
        torch.testing.assert_close(mine, theirs[name], rtol=1e-4, atol=2e-6, msg=name)
        frozen = ~masks[name] if name in masks else torch.ones_like(mine, dtype=torch.bool)
        assert torch.equal(mine[frozen], original[name][frozen]), name
        moved += int((mine != original[name]).sum())
    assert moved > 0.9 * sum(int(m.sum()) for m in masks.values())
    assert all(value.numel() == masks[name].sum() for name, value in deltas.values.items())
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()] == [1, 2, 3]


def test_auto_batch_size_halves_until_it_fits_and_changes_nothing(setup, tmp_path):
    """The network fails as PyTorch's CPU allocator does when more than four pictures pass through it at once."""
    trained = []
    for limit in (None, 4):
        trainer, pipe, config = setup(auto_batch_size=True)

        def refuse(module, args, limit=limit):
            if limit and len(args[0]) > limit:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")

        pipe.unet.register_forward_pre_hook(refuse)
        parameters = scoped_parameters(pipe.unet, config.scope)
        scores = trainer.saliency(parameters, torch.arange(len(FORGET)))
        assert trainer.batches.size == (2 if limit else 4)
        deltas = MaskedChange(parameters, top_density(scores, 0.5))
        trainer.batches.size = 4
        trainer.train(deltas, tmp_path / "log.jsonl", Checkpoints(tmp_path, {}, 2))
        assert trainer.batches.size == (2 if limit else 4)
        trained.append({name: p.detach().clone() for name, p in parameters.items()})
    for name, weights in trained[0].items():
        torch.testing.assert_close(trained[1][name], weights, rtol=1e-3, atol=1e-4)
    trainer, pipe, config = setup(auto_batch_size=True)
    pipe.unet.register_forward_pre_hook(lambda module, args: refuse(module, args, limit=0.5))
    with pytest.raises(SalunError, match="Not even one picture at a time fits"):
        trainer.saliency(scoped_parameters(pipe.unet, "all"), torch.arange(len(FORGET)))


def test_snapped_weights_are_base_plus_the_stored_values(setup, tmp_path):
    trainer, pipe, config = setup(learning_rate=3e-3)
    parameters = scoped_parameters(pipe.unet, config.scope)
    original = {name: p.detach().clone() for name, p in parameters.items()}
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    deltas = MaskedChange(parameters, masks)
    trainer.train(deltas, tmp_path / "log.jsonl", Checkpoints(tmp_path, {}, 2))
    deltas.snap(torch.float16)
    for name, parameter in parameters.items():
        stored = deltas.values[name].detach().half().float().view(parameter.shape)
        assert torch.equal(parameter, original[name] + stored), name


def test_places_that_are_found_anew_are_the_kept_ones(setup, tmp_path):
    """What a GPU does, whose memory is dear: one bit a weight in place of its place."""
    trained = []
    for keep in (True, False):
        trainer, pipe, config = setup()
        parameters = scoped_parameters(pipe.unet, "all")
        random = torch.Generator().manual_seed(0)
        masks = {n: torch.rand(p.shape, generator=random) < 0.3 for n, p in parameters.items()}
        deltas = MaskedChange(parameters, masks, keep_places=keep)
        assert {places.dtype for places in deltas.where.values()} == {torch.int32 if keep else torch.uint8}
        trainer.train(deltas, tmp_path / "log.jsonl", Checkpoints(tmp_path, {}, 2))
        trained.append({name: p.detach().clone() for name, p in parameters.items()})
    assert all(torch.equal(weights, trained[1][name]) for name, weights in trained[0].items())


def test_the_trained_weights_come_back_after_a_look_at_the_base_even_if_it_fails(setup):
    _, pipe, _ = setup()
    parameters = scoped_parameters(pipe.unet, "cross-attention")
    original = {name: p.detach().clone() for name, p in parameters.items()}
    deltas = MaskedChange(parameters, {n: torch.ones_like(p, dtype=torch.bool) for n, p in parameters.items()})
    for value in deltas.values.values():
        value.data += 0.5
    deltas.write()
    trained = {name: p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(RuntimeError, match="out of memory"), deltas.at_base():
        assert all(torch.equal(p, original[name]) for name, p in parameters.items())
        raise RuntimeError("out of memory")
    assert all(torch.equal(p, trained[name]) and not torch.equal(p, original[name]) for name, p in parameters.items())


def test_no_gradient_is_made_or_kept_where_nothing_may_move(setup):
    _, pipe, config = setup()
    parameters = scoped_parameters(pipe.unet, "cross-attention")
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()}
    first = next(iter(masks))
    masks[first].view(-1)[3] = True
    deltas = MaskedChange(parameters, masks)
    deltas.pack_gradients()
    pipe.unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 16)).sample.sum().backward()
    assert [name for name, p in pipe.unet.named_parameters() if p.requires_grad] == [first]
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert {name: value.grad.shape for name, value in deltas.values.items()} == {first: (1,)}
    deltas.parameters[first].grad = torch.full_like(parameters[first], 9)  # as of an earlier backward
    deltas.clear_gradients()
    pipe.unet(torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 7, 16)).sample.mul(0).sum().backward()
    assert deltas.values[first].grad.tolist() == [0], "a step's gradient is its own alone"


def test_a_checkpoint_before_adams_first_step(setup):
    """fp16's loss scale may be too high for every step so far: training goes on as from the beginning."""

    def trained(from_checkpoint: bool):
        _, pipe, _ = setup()
        parameters = scoped_parameters(pipe.unet, "cross-attention")
        masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
        change = MaskedChange(parameters, masks)
        adam = PackedAdam(change, 1e-2, {"own": torch.nn.Parameter(torch.ones(2))}, 1e-2)
        if from_checkpoint:
            state, updates = adam.state(), adam.updates
            assert updates == 0
            adam.load_state({name: tensor.clone() for name, tensor in state.items()}, updates)
        for value in adam.trained.values():
            value.grad = torch.linspace(-1, 1, value.numel()).view_as(value)
        adam.adam.step()
        return adam.state()

    fresh, resumed = trained(False), trained(True)
    assert fresh.keys() == resumed.keys()
    assert all(torch.equal(fresh[name], resumed[name]) for name in fresh)
    assert fresh["exp_avg.own"].any()


def test_a_loss_that_is_not_finite_stops_the_run(setup, tmp_path):
    trainer, pipe, config = setup(learning_rate=1e30, max_train_steps=5)
    parameters = scoped_parameters(pipe.unet, config.scope)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    deltas = MaskedChange(parameters, masks)
    with pytest.raises(SalunError, match="loss is not finite at step"):
        trainer.train(deltas, tmp_path / "log.jsonl", Checkpoints(tmp_path, {}, 2))


def test_an_interrupted_set_is_continued_and_equal(setup, tmp_path, monkeypatch):
    from salun_diffusion.data import cache as latents

    monkeypatch.setattr(latents, "SHARD", 2)
    trainer, pipe, config = setup()
    shards = sorted((tmp_path / "data").glob("forget-*/latents-*.safetensors"))
    assert len(shards) == 3
    untouched = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    again = drawn_set(model_of(pipe), [FORGET], config, "forget", trainer.accelerator)
    assert torch.equal(again.latents[:], trainer.batches.sets["forget"].latents[:])
    assert shards[0].stat().st_mtime_ns == untouched
    shards[2].write_bytes(shards[2].read_bytes()[:-3])
    with pytest.raises(SalunError, match="cut short.*delete that file"):
        drawn_set(model_of(pipe), [FORGET], config, "forget", trainer.accelerator)


def test_a_changed_cache_is_refused(setup, tmp_path):
    trainer, pipe, config = setup()
    (shard,) = (tmp_path / "data").glob("forget-*/latents-*.safetensors")
    whole = shard.read_bytes()
    for spoiled in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-64] + bytes(64)):
        shard.write_bytes(spoiled)
        with pytest.raises(SalunError, match="its checksum differs; it is only a cache, so delete that file"):
            drawn_set(model_of(pipe), [FORGET], config, "forget", trainer.accelerator)
    shard.unlink()
    drawn_set(model_of(pipe), [FORGET], config, "forget", trainer.accelerator)
    assert shard.read_bytes() == whole
    manifest = shard.with_name("manifest.json")
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**told, "prompts": ["something else"] * len(told["prompts"])}))
    with pytest.raises(SalunError, match="prompts differ from their checksum; .* delete that folder"):
        drawn_set(model_of(pipe), [FORGET], config, "forget", trainer.accelerator)


def test_a_picture_does_not_depend_on_its_batch(setup):
    from salun_diffusion.models.sampling import sample

    _, pipe, _ = setup()
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    alone = sample(pipe, FORGET, batch_size=1, **options)
    together = sample(pipe, FORGET, batch_size=4, **options)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0], alone[2])  # another seed, the same prompt


def test_scopes(setup):
    _, pipe, _ = setup()
    names = [name for name, _ in pipe.unet.named_parameters()]
    assert list(scoped_parameters(pipe.unet, "all")) == names
    crossed = list(scoped_parameters(pipe.unet, "cross-attention"))
    assert crossed == [name for name in names if ".attn2." in name]
    assert {name for name, p in pipe.unet.named_parameters() if p.requires_grad} == set(crossed)
    both = list(scoped_parameters(pipe.unet, "cross-attention+resnets"))
    assert both == [name for name in names if ".attn2." in name or ".resnets." in name] and both != crossed
    keys = list(scoped_parameters(pipe.unet, r"attn2\.to_[kv]\.weight$"))
    assert keys and all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in keys)
    with pytest.raises(SalunError, match="in the scope 'crossattention': choose cross-attention, "):
        scoped_parameters(pipe.unet, "crossattention")
    with pytest.raises(SalunError, match=r"--scope 'attn2\(' is no regular expression"):
        scoped_parameters(pipe.unet, "attn2(")
