"""Unlearning methods, one paper a file. A method is a function ``(predict, batch, alpha) -> (forget, retain)`` losses;
the trainer minimises ``forget + alpha · retain`` on the masked weights."""

from .salun import salun

METHODS = {"salun": salun}
