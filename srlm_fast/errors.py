"""The exceptions that a user is meant to read."""


class UserError(Exception):
    """Bad input from the user: one line that says what was wrong, where, and what to do.

    Scripts print the message and exit with code 2; a library caller may catch it.
    """


class Interrupted(Exception):
    """The program had to stop (a signal, save_by) and did so after saving what was done."""

    code = 143
    """Exit code of the process; `srlm_fast.stop` knows which."""
