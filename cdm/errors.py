"""The one family of errors that a command line shows as a message, without a traceback."""


class CdmError(Exception):
    """Something the user can mend: the message says what is wrong and what to do, one line a problem."""
