"""The one base class of this project's errors: a sentence that says what was given, what was expected and what to do."""


class AlignblindError(Exception):
    """Raised for input or results that cannot be used; the command line prints the sentence and exits with 2, without a traceback."""


class ScoreError(AlignblindError):
    """Stored answers that cannot be read or grouped."""


class ResultError(AlignblindError):
    """Saved results that cannot be read, or do not belong where they were found."""
