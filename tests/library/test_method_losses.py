"""Each gradient method's loss against a plain version of it."""

import copy
import json
import random
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from plain_losses import (
    plain_concept_ablation,
    plain_denoising,
    plain_esd,
    plain_esd_target,
    plain_finetune,
    plain_forget_me_not,
    plain_gradient_ascent,
    plain_half_denoised,
    plain_race,
    plain_salun,
    plain_salun_anchored,
    plain_selective_amnesia,
    plain_spm,
    scoped_names,
    told,
    trainer_for,
)
from plain_robust import plain_mix, plain_salun_adv, plain_stereo, plain_ticoe
from shell import ROOT

from salun_diffusion.data.sets import batches
from salun_diffusion.methods import METHODS
from salun_diffusion.methods.forget_me_not import Recorder
from salun_diffusion.methods.ticoe import mix
from salun_diffusion.models.load import load_pipeline
from salun_diffusion.models.text_unet import encode
from salun_diffusion.training.change import MaskedChange
from salun_diffusion.training.checkpoints import Checkpoints

PLAIN = {
    "salun": plain_salun,
    "random_label": plain_salun,
    "salun anchored": plain_salun_anchored,
    "gradient_ascent": plain_gradient_ascent,
    "concept_ablation": plain_concept_ablation,
    "finetune": plain_finetune,
    "esd": plain_esd,
    "salun_esd": plain_esd,
    "forget_me_not": plain_forget_me_not,
    "selective_amnesia": plain_selective_amnesia,
    "race": plain_race,
    "salun_adv": plain_salun_adv,
    "stereo": plain_stereo,
    "spm": plain_spm,
    "ticoe": plain_ticoe,
}


OPTIONS = {  # every part of these methods has its turn within three steps
    "salun anchored": ["anchored=0.5"],
    "race": ["warm_up=0.3", "radius=0.5", "attack_steps=3", "lasso=0.1"],
    "salun_adv": [
        "attacked=0.15", "inverted=0.3", "empty=0.3", "unrelated=0.2", "rounds=1", "search_steps=2", "search_batch=4",
        "anchored=0.09",
    ],
    "spm": ["anchoring=50", "anchors=2"],
    "stereo": ["rounds=2", "round_steps=2", "round_rate=0.001", "search_steps=2", "search_batch=4"],
    "ticoe": [
        "wordings=a drawing of {}, {} there, {}, my {}", "mixed=3", "resample=2", "noise=0.1", "negative_guidance=2",
        "fuser_rate=0.01",
    ],
}  # fmt: skip


@pytest.mark.parametrize("method", PLAIN)
def test_steps_match_a_plain_loop(method, folders, tmp_path):
    """Three steps of dense Adam on the plain loss, every pass on its own."""
    trainer, parameters, base = trainer_for(
        method.split()[0], folders["sd1"], tmp_path, method_option=OPTIONS.get(method), lr_scheduler="constant"
    )
    plain = copy.deepcopy(base)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    trainer.train(MaskedChange(parameters, masks), tmp_path / "log.jsonl", Checkpoints(tmp_path, {}, 2))
    trainer.method.close()

    theirs = dict(scoped_names(plain, trainer.config.scope))
    assert theirs.keys() == parameters.keys()
    adam = torch.optim.Adam(theirs.values(), lr=1e-3)
    images = trainer.batches.sets[trainer.method.forget_set]
    forgets, retains = batches(len(images), 3, 0), batches(6, 3, 1)
    logged = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").open()]
    for step in range(3):
        forget = next(trainer.batches.micro_batches(images, next(forgets), "forget", step))
        index = next(retains)
        kept = trainer.batches.retain
        retain = next(trainer.batches.micro_batches(kept, index, "retain", step)) if kept else None
        loss = PLAIN[method](plain, base, forget, retain, trainer)
        assert logged[step] == pytest.approx(loss.item(), rel=1e-3, abs=1e-6), step
        adam.zero_grad()
        loss.backward()
        adam.step()
    # Adam makes a whole step of a gradient that is nothing but rounding, so single weights may differ by more
    original = dict(scoped_names(base, trainer.config.scope))
    apart = sum(float((mine - theirs[name]).square().sum()) for name, mine in parameters.items())
    change = sum(float((mine - original[name]).square().sum()) for name, mine in parameters.items())
    assert apart**0.5 < 2e-3 * change**0.5


@pytest.mark.parametrize("attack_by", ["gradient", "sign"])
def test_advunlearn_matches_a_plain_loop(attack_by, folders, tmp_path):
    """One prompt at a time. A word is a row of the token table, and its gradient is that row's."""
    options = ["warm_up=0.3", "attack_steps=3", "attack_rate=0.1", f"attack_by={attack_by}"]
    trainer, parameters, unet = trainer_for("advunlearn", folders["sd1"], tmp_path, method_option=options)
    plain, tokenizer = copy.deepcopy(trainer.model.pipe.text_encoder).requires_grad_(), trainer.model.pipe.tokenizer
    original = copy.deepcopy(plain.state_dict())
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    change = MaskedChange(parameters, masks, component="text_encoder")
    trainer.train(change, tmp_path / "log.jsonl", Checkpoints(tmp_path, {}, 2))
    logged = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").open()]

    def said(prompt):
        return plain(tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids)[0]

    theirs = {name: p for name, p in plain.named_parameters() if "token_embedding" not in name}
    assert theirs.keys() == parameters.keys()
    adam, own, kept = torch.optim.Adam(theirs.values(), lr=1e-3), trainer.batches, trainer.batches.retain
    forgets, retains = batches(1, 3, 0), batches(6, 3, 1)
    table, place = plain.get_input_embeddings().weight, tokenizer("*").input_ids[1]
    for step in range(3):
        forget = next(own.micro_batches(own.sets["name"], next(forgets), "forget", step))
        x, t, target = plain_esd_target(unet, unet, forget, trainer)
        condition = said("steam engine")
        if step:
            before, key = table[place].detach().clone(), ("advunlearn", step)
            row = torch.randint(len(table), (1,), generator=own.generator(*key, "word", "steam engine"))
            word = torch.nn.Parameter(table[row[0]].detach().clone())
            search = torch.optim.Adam([word], lr=0.1)
            for i in range(3):
                noise = torch.randn(1, 4, 8, 8, generator=own.generator(*key, i, "steam engine"))
                done = random.Random(repr((0, *key, i))).randrange(4)
                z, at = plain_half_denoised(unet, noise, told(forget)[:1], trainer, done)
                table.data[place], table.grad = word.data, None
                found = unet(z, at, said("* steam engine")).sample
                (found - unet(z, at, told(forget)[:1]).sample.detach()).square().sum().backward()
                word.grad = table.grad[place].sign() if attack_by == "sign" else table.grad[place].clone()
                search.step()
            table.data[place] = word.data
            condition = said("* steam engine")
            table.data[place] = before
        retain = next(own.micro_batches(kept, next(retains), "retain", step))
        loss = F.mse_loss(unet(x, t, condition.expand_as(told(forget))).sample, target)
        for i, number in enumerate(kept.prompt_index[retain.index].tolist()):
            one = retain.noisy[i : i + 1], retain.timesteps[i : i + 1]
            wanted = unet(*one, told(retain)[i : i + 1]).sample.detach()
            loss = loss + 0.3 / 3 * F.mse_loss(unet(*one, said(kept.prompts[number])).sample, wanted)
        assert logged[step] == pytest.approx(loss.item(), rel=1e-3, abs=1e-6), step
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert torch.equal(table, original["embeddings.token_embedding.weight"])
    apart = sum(float((mine - theirs[name]).square().sum()) for name, mine in parameters.items())
    change = sum(float((mine - original[name]).square().sum()) for name, mine in parameters.items())
    assert apart**0.5 < 5e-3 * change**0.5


@pytest.mark.parametrize("scale", ["restored", "normed"])
def test_ticoe_mixes_prompts_in_the_scale_that_they_have(scale):
    torch.manual_seed(0)
    states, noise = 5 * torch.randn(3, 7, 32) + 2, 0.1 * torch.randn(7, 32)
    found = mix(states, torch.tensor([0.5, 0.2, 0.3]), noise, scale)
    torch.testing.assert_close(found, plain_mix(states, [0.5, 0.2, 0.3], noise, scale == "restored"))
    alone = mix(states[:1], torch.ones(1), torch.zeros(7, 32), scale)
    assert torch.allclose(alone, states[0], rtol=1e-4, atol=1e-4) == (scale == "restored")


def test_esd_negates_the_name_alone(folders, tmp_path):
    """And not what else a prompt of the concept asks for."""
    trainer, _, _ = trainer_for("esd", folders["sd1"], tmp_path)
    batch = next(
        trainer.batches.micro_batches(trainer.batches.sets["name"], torch.zeros(3, dtype=torch.long), "forget", 0)
    )
    wanted = encode(trainer.model.pipe, ["steam engine"])["encoder_hidden_states"]
    torch.testing.assert_close(told(batch), wanted.expand(3, -1, -1))


def test_salun_can_aim_at_the_base_model(folders, tmp_path):
    """With target=frozen the anchor's prediction is the base model's, at every step."""
    options = {"method_option": ["target=frozen"], "max_train_steps": 2, "mask": "none"}
    trainer, parameters, base = trainer_for("salun", folders["sd1"], tmp_path, **options)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    trainer.train(MaskedChange(parameters, masks), tmp_path / "log.jsonl", Checkpoints(tmp_path, {}, 2))
    forget = next(trainer.batches.micro_batches(trainer.batches.sets["forget"], torch.arange(3), "forget", 0))
    retain = next(trainer.batches.micro_batches(trainer.batches.retain, torch.arange(3), "retain", 0))
    with torch.no_grad():
        found = trainer.method.losses(forget, retain)[0]
        anchor = base(forget.noisy, forget.timesteps, told(forget, "anchor_condition")).sample
        concept = trainer.model.network(forget.noisy, forget.timesteps, told(forget)).sample
    torch.testing.assert_close(found, F.mse_loss(concept, anchor))


def test_the_recorder_computes_what_the_layer_does(folders):
    network = load_pipeline(str(folders["sdxl"])).unet
    layer = next(module for name, module in network.named_modules() if name.endswith("attn2"))
    hidden, text = torch.randn(2, 16, layer.to_q.in_features), torch.randn(2, 77, layer.to_k.in_features)
    layer.set_processor(AttnProcessor())
    plain = layer(hidden, text)
    maps: list = []
    layer.set_processor(Recorder(maps))
    torch.testing.assert_close(layer(hidden, text), plain)
    assert maps[0].shape == (2, layer.heads, 16, 77)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, layer.heads, 16))
    with torch.no_grad():
        layer(hidden, text)
    assert len(maps) == 1, "pictures drawn between steps leave nothing behind"


def test_forget_me_not_gives_the_network_its_attention_back(folders, tmp_path):
    trainer, _, base = trainer_for("forget_me_not", folders["sd1"], tmp_path)
    assert any(isinstance(processor, Recorder) for processor in trainer.model.network.attn_processors.values())
    trainer.method.close()
    kinds = [{k: type(p) for k, p in network.attn_processors.items()} for network in (trainer.model.network, base)]
    assert kinds[0] == kinds[1]


def test_the_method_that_the_document_adds_trains(folders, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    module = types.ModuleType("salun_diffusion.methods.noise_ablation")
    module.__package__ = "salun_diffusion.methods"
    exec(re.search(r"```python\n(.*?)```", page, flags=re.S)[1], module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(METHODS, "noise_ablation", "noise_ablation.NoiseAblation")
    trainer, parameters, base = trainer_for("noise_ablation", folders["sd1"], tmp_path)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    trainer.train(MaskedChange(parameters, masks), tmp_path / "log.jsonl", Checkpoints(tmp_path, {}, 2))
    forget = next(trainer.batches.micro_batches(trainer.batches.sets["anchor"], next(batches(6, 3, 0)), "forget", 0))
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(plain_denoising(base, forget).item(), rel=1e-4)
