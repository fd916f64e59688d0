"""Errors that a user can mend: every command shows them as a message of one line, without a traceback."""


class CdmError(Exception):
    """Something the user can mend: the message says what is wrong and what to do, one line a problem."""
