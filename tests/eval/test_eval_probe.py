"""`probe` beside a plain loop over single probes with hooks of its own."""

import json

import pytest
import tiny
import torch
from test_eval_accuracy import base  # noqa: F401  (a fixture)

from eval.measures import probe
from eval.pages import compare
from salun_diffusion import load_erasure
from salun_diffusion.errors import SalunError
from salun_diffusion.models import load_model


def measure(base, output, *erasures, **options):  # noqa: F811
    runs = [str(base / "runs" / name) for name in erasures or ("forgets", "no-mask")]
    small = {"num_prompts": 2, "num_probes": 3, "num_neighbours": 2, "timesteps": [100, 900]}
    asked = {"pretrained_model_name_or_path": str(base), "concept": ["airplane"], "erasure": runs} | small | options
    return probe.run(probe.Options(output_dir=output, **asked))


def test_changes_are_those_of_a_plain_loop(base, tmp_path):  # noqa: F811
    found = measure(base, tmp_path / "out")
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: len(prompts) for name, prompts in found["conditions"].items()} == {
        "concept": 2, "neighbours": 4, "nothing": 1,
    }  # fmt: skip
    assert all("airplane" in prompt for prompt in found["conditions"]["concept"])
    assert not any("airplane" in prompt for prompt in found["conditions"]["neighbours"])

    def activations(model, noise, t, prompt):
        seen, handles = {}, []
        for name in found["layers"]:
            layer = model.network.get_submodule(name)
            handles.append(layer.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o[0][0]})))
        with torch.no_grad():
            model.predict(noise[None], torch.tensor([t]), model.encode([prompt]))
        for handle in handles:
            handle.remove()
        return seen

    before, after = load_model(str(base)), load_model(str(base))
    load_erasure(after.pipe, str(base / "runs" / "forgets"))
    noises = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for condition, prompts in found["conditions"].items():
        sums = dict.fromkeys(found["layers"], 0.0)
        for prompt in prompts:
            for t in (100, 900):
                for noise in noises:
                    old, new = (activations(model, noise, t, prompt) for model in (before, after))
                    for name in sums:
                        difference = (new[name] - old[name]).double().square().sum().sqrt()
                        sums[name] += float(100 * difference / old[name].double().square().sum().sqrt())
        count = len(prompts) * 2 * 3
        told = found["models"][1]["change"][condition]
        assert told["mean"]["n"] == count
        assert told["layers"] == pytest.approx([total / count for total in sums.values()], abs=2e-3)
        assert told["mean"]["mean"] == pytest.approx(sum(told["layers"]) / len(sums), abs=6e-3)
        assert min(told["layers"]) > 0.1, "this erasure changes every block"


def test_the_blocks_stand_in_the_order_of_the_data(tmp_path):
    tiny.build(tmp_path)
    names = list(probe.blocks(load_model(str(tmp_path)).network))
    assert names == [
        "down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1",
    ]  # fmt: skip


def test_nothing_is_drawn_and_the_columns_join_a_comparison(base, tmp_path):  # noqa: F811
    before = measure(base, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json"]
    assert "change" not in before["models"][0]
    told = compare.compare([tmp_path / "out"], tmp_path / "compared")
    assert list(told["columns"]) == ["probe_concept", "probe_neighbours", "probe_nothing", "megabytes"]
    half = measure(base, tmp_path / "half", "forgets", scale=[0.1])
    one, tenth = (found["models"][1]["change"]["concept"]["mean"]["mean"] for found in (before, half))
    assert 0 < tenth < one / 3, "a tenth of an erasure changes less"


def test_a_timestep_that_the_schedule_has_not(base, tmp_path):  # noqa: F811
    with pytest.raises(SalunError, match="--timesteps 1000 is not in the model's schedule: give numbers from 0 to 999"):
        measure(base, tmp_path / "out", timesteps=[1000])
