"""Retrain: a fresh model on the retain set alone, as the source was trained. Exact unlearning, which all are measured
against.
"""

from ..training import train
from .task import Task


def retrain(task: Task) -> None:
    task.model.load_state_dict(task.fresh().state_dict())
    train(task.model, task.retain, task.recipe, task.generator, task.title)
