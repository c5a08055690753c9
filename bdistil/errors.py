"""The two kinds of failure a user can meet; everything else is a bug."""


class UserError(ValueError):
    """What the user gave cannot be used. The message names it, what was allowed, and the way out; exit status 2."""


class RunError(RuntimeError):
    """A run that had started cannot go on. What was committed before it is intact; exit status 1."""
