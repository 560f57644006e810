"""Unlearning methods, one paper a file. What a method must have is in ``method.py``; docs/add-a-method.md adds one."""

from importlib import import_module

METHODS = {
    "salun": "salun.SalUn",
    "esd": "esd.ESD",
    "esd_200": "esd.ESD200",
    "salun_esd": "esd.SalUnESD",
    "forget_me_not": "forget_me_not.ForgetMeNot",
    "gradient_ascent": "gradient_ascent.GradientAscent",
    "random_label": "salun.RandomLabel",
    "finetune": "finetune.FineTune",
    "concept_ablation": "concept_ablation.ConceptAblation",
    "uce": "uce.UCE",
    "rece": "rece.RECE",
    "speed": "speed.SPEED",
    "mace": "mace.MACE",
    "fia": "fia.FIA",
    "selective_amnesia": "selective_amnesia.SelectiveAmnesia",
    "race": "race.RACE",
    "stereo": "stereo.STEREO",
    "advunlearn": "advunlearn.AdvUnlearn",
    "salun_adv": "salun_adv.SalUnAdv",
    "spm": "spm.SPM",
    "barrier": "barrier.BARRIER",
    "ticoe": "ticoe.TICoE",
    "piu": "piu.PIU",
    "sld": "guard.SLD",
    "safree": "guard.SAFREE",
    "concept_steerers": "guard.ConceptSteerers",
    "saeuron": "guard.SAeUron",
    "groce": "guard.GrOCE",
    "egloce": "guard.EGLOCE",
}
NEEDS_DRAWING = ("guidance_scale", "sample_batch_size")  # and those that only pictures have that a run draws
NEEDS_SALIENCY = (
    "saliency",
    "density",
    "threshold",
    "saliency_guidance",
)  # settings that only a saliency mask has a use for


def find_method(name: str) -> type:
    """The class of a name in ``METHODS``, imported now: the names alone cost ``--help`` no time."""
    module, kind = METHODS[name].split(".")
    return getattr(import_module(f".{module}", __name__), kind)


def names_of(method: type) -> list[str]:
    """The names of ``method`` and of those that it is made from, the most general first: what is set for ``salun``
    holds for ``random_label`` too, unless that has settings of its own.
    """
    own = {path.split(".")[1]: name for name, path in METHODS.items()}
    return [own[kind.__name__] for kind in reversed(method.__mro__) if kind.__name__ in own]
