"""The one exception of the library: its text is one sentence that a command can print as it stands."""


class SalunError(ValueError):
    """What was given, what is allowed, what to do: in one sentence. Commands print it and exit non-zero."""
