"""The one exception that means: the user can fix this."""


class UserError(Exception):
    """Bad input, told in one sentence.

    The message names the file, key or rank, the offending value, and what to do about it.
    The command line prints it without a traceback and exits with status 2.
    """


class PassingError(UserError):
    """A UserError whose cause may be gone at the next attempt: a lock, a full disk, a late rank,
    a broken machine."""
