"""Neighbours: what became of the words around the concept? Other words for it, what it is a kind of, and its like.

HUB and EraseBench ask this of erased models: an erasure that is only of the word leaves its synonyms, and one that is
of too much takes the concept's kind, the other things of that kind, and its look-alikes along.

``results.json`` (``format`` "salun-diffusion neighbours 1"; what it shares with others is in :mod:`eval.results` and
:mod:`eval.judges.labelled`) adds ``neighbours`` (what was asked for, by set) and ``num_images`` (of each set) to
``settings``, and to each model ``neighbours``: column → proportion. The sets of ``samples.jsonl`` are "concept",
"synonyms", "kind", "siblings" and "look_alikes".
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from salun_diffusion.errors import SalunError
from salun_diffusion.options import option
from salun_diffusion.tables import aligned

from .. import options
from . import Column

if TYPE_CHECKING:
    from salun_diffusion.concepts.concept import Concept, Row

NAME = "neighbours"
SUMMARY = "synonyms, the kind it is of, others of that kind, and look-alikes"
DESCRIPTION = """\
Draw prompts that ask for the concept, for other words for it, for the kind of thing that it is ("a vehicle"), for other
things of that kind, and for what looks like it, with the base model and with each erasure. Synonyms should be gone with
the concept; the kind should still be drawn, as something else; siblings and look-alikes should be as before. Which
these are says the base model's concepts.json, or --synonyms, --kind, --siblings and --look_alikes say it."""
FORMAT = "salun-diffusion neighbours 1"
PROTOCOL = (
    "neighbours/1: prompts with one thing in them, the same and with the same starting noise for every model; the "
    "classifier's likeliest answers; concept and synonyms are gone if the concept is the answer to no question; a kind "
    "is right if one of its things is seen, and shows the concept if that is; the others are right if they are seen; "
    "Wilson 95% intervals"
)
COLUMNS = {
    "word_gone": Column("the word: gone", "↑", "the concept's own word no longer draws it"),
    "synonyms_gone": Column("synonyms: gone", "↑", "other words for the concept no longer draw it"),
    "kind_shows": Column(
        "its kind: shows it", "↓", "what the concept is a kind of is asked for (a vehicle), and drawn as the concept"
    ),
    "kind_right": Column("its kind: right", "↑", "what the concept is a kind of is drawn as something of that kind"),
    "siblings_right": Column("siblings: right", "↑", "other things of the concept's kind are still drawn"),
    "look_alikes_right": Column("look-alikes: right", "↑", "things that look like the concept are still drawn"),
}
SETS = {
    "concept": "The concept's own word", "synonyms": "Other words for it", "kind": "What it is a kind of",
    "siblings": "Others of its kind", "look_alikes": "Look-alikes",
}  # fmt: skip
GRID_ROWS = 3  # of each set, on a page


@dataclass
class Options(options.Labelled):
    """How many prompts of each set, and which words they take."""

    num_images: int = option(96, "pictures of each set, a model", metavar="N", least=1)
    synonyms: list[str] | None = option(
        None, "other words for the concept (default: as concepts.json has it)", several=True, metavar="WORD"
    )
    kind: str | None = option(
        None, "the word for what it is a kind of (default: as concepts.json has it)", metavar="WORD"
    )
    siblings: list[str] | None = option(
        None, "other things of that kind (default: as concepts.json has it)", several=True, metavar="WORD"
    )
    look_alikes: list[str] | None = option(
        None, "what looks like it (default: as concepts.json has it)", several=True, metavar="WORD"
    )


def run(options: Options) -> dict:
    """Measure the base model and each erasure, write ``output_dir``'s files, print a table, return the results.

    Raises:
        SalunError: also for a concept of which no neighbour is known.
    """
    from ..judges.labelled import Labelled
    from ..results import under, write

    labelled = Labelled(options)
    if len(labelled.concepts) > 1 or options.judge != "classifier":
        raise SalunError("neighbours takes one --concept and --judge classifier: measure each concept by itself.")
    concept = labelled.concepts[0]
    asked, rows = words(concept, options), []
    for kind, answers in asked.items():
        rows += [(kind, row) for row in word_rows(concept, answers, options.num_images, kind, options.seed)]
    results, samples = labelled.run(FORMAT, rows)
    results |= {"protocol": PROTOCOL + under(results["settings"])}
    results["settings"] |= {"num_images": options.num_images, "neighbours": {kind: list(asked[kind]) for kind in asked}}
    if labelled.state.is_main_process:
        for model in results["models"]:
            lines = [line for line in samples if line["model"] == model["name"]]
            model["neighbours"] = shares(lines, asked, labelled.label)
        write(options.output_dir, results, samples)
        print(table(results))
    return results


def scores(model: dict) -> dict:
    """Column → score of a model of the results."""
    return model["neighbours"]


def words(concept: "Concept", options: Options) -> dict[str, dict[str, str]]:
    """Set → word to ask for → what a picture of it shows; sets for which no word is known are left out.

    Raises:
        SalunError: no neighbour is known.
    """
    known = concept.vocabulary.neighbours
    own = known.get(concept.value, {})
    members = {
        kind: options.siblings
        or [word for word, told in known.items() if kind in told.get("kinds", []) and word not in concept.names]
        for kind in ([options.kind] if options.kind else own.get("kinds", []))
    }
    if options.kind and not members[options.kind]:
        raise SalunError(f"--kind {options.kind} needs to know what else is one: name some with --siblings.")
    siblings = options.siblings or [word for words in members.values() for word in words]
    look_alikes = options.look_alikes or own.get("look_alikes", [])
    if itself := next((word for word in (*siblings, *look_alikes) if word in concept.names), None):
        raise SalunError(f"'{itself}' is the concept itself, and no sibling or look-alike of it: leave it out.")
    found = {
        "concept": {concept.value: concept.label},
        "synonyms": dict.fromkeys(options.synonyms or concept.vocabulary.synonyms(concept.value), concept.label),
        "kind": {kind: ", ".join((concept.label, *words)) for kind, words in members.items() if words},
        "siblings": {word: word for word in siblings},
        "look_alikes": {word: word for word in look_alikes},
    }
    if not any(found[name] for name in SETS if name != "concept"):
        raise SalunError(
            f"No neighbour of '{concept.value}' is known: name some with --synonyms, --kind and --siblings, or "
            "--look_alikes."
        )
    return {name: asked for name, asked in found.items() if asked}


def word_rows(concept: "Concept", asked: dict[str, str], count: int, kind: str, seed: int) -> list["Row"]:
    """``count`` prompts with one thing of the concept's slot in them, shared among the words ``asked`` (word → what its
    picture shows).

    Raises:
        SalunError: the vocabulary has no such prompt.
    """
    from salun_diffusion.concepts.templates import placeholders, slot_of

    vocabulary, rows = concept.vocabulary, []
    templates = []
    for template in vocabulary.templates:
        if [slot_of(name) for name in dict.fromkeys(placeholders(template))].count(concept.slot) == 1:
            templates.append(template)
    if not templates:
        raise SalunError(
            f"No template has one '{concept.slot}' alone in it: neighbours cannot ask for '{list(asked)[0]}'."
        )
    alone = replace(vocabulary, templates=templates)
    for number, word in enumerate(asked):
        share = count // len(asked) + (number < count % len(asked))
        of_word = replace(concept, name=word, value=word, synonyms=(), vocabulary=alone)
        for row in of_word.forget_rows(share, seed, f"neighbours-{kind}-{word}"):
            expect = {question: asked[word] if answer == word else answer for question, answer in row.expect.items()}
            rows.append(replace(row, anchor_prompt=None, expect=expect or {"label": asked[word]}))
    return rows


def shares(rows: list[dict], asked: dict[str, dict[str, str]], label: str) -> dict[str, dict]:
    """Column → share of the pictures of its set, with its interval; a set that was not drawn is left out.

    Args:
        rows: judged, of one model.
        asked: as :func:`words` gives it.
        label: the concept's.
    """
    from salun_diffusion.stats import proportion

    from ..judges import metrics

    def right(row: dict) -> bool:
        """Whether what was asked for is the answer to each question that is about it."""
        about = [q for shown in asked[row["set"]].values() for q in row["expect"] if row["expect"][q] == shown]
        return all(metrics.answered(row, question) for question in about)

    of = {kind: [row for row in rows if row["set"] == kind] for kind in SETS}
    found = {
        "word_gone": proportion(metrics.forgotten(row, label) for row in of["concept"]),
        "synonyms_gone": proportion(metrics.forgotten(row, label) for row in of["synonyms"]),
        "kind_shows": proportion(not metrics.forgotten(row, label) for row in of["kind"]),
        "kind_right": proportion(map(right, of["kind"])),
        "siblings_right": proportion(map(right, of["siblings"])),
        "look_alikes_right": proportion(map(right, of["look_alikes"])),
    }
    return {name: share for name, share in found.items() if share}


def table(results: dict) -> str:
    """The scores as aligned text, a model a line, in percent with their intervals."""
    columns = list(results["models"][0]["neighbours"])
    lines = [["", *(COLUMNS[column].title for column in columns)]]
    for model in results["models"]:
        cells = [model["neighbours"][column] for column in columns]
        lines.append([model["name"], *(f"{c['percent']:.1f} ({c['low']:.1f}-{c['high']:.1f})" for c in cells)])
    return aligned(lines)
