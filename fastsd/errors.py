"""The one exception that fastsd raises for bad input."""


class FastsdError(ValueError):
    """Bad input, said in one line that names the flag, file or key and what would be right.

    The API raises it; the command line prints it as ``error: <message>`` and exits with code 2. It is a ``ValueError``,
    so callers who know nothing of fastsd catch it as one. Programming errors inside fastsd are never wrapped in it.
    """
