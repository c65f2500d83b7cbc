"""The one exception that stands for a mistake which its reader can mend."""


class MisfmError(Exception):
    """A single sentence for the user: what was expected, what arrived, what to do.

    The command line prints it without a traceback and exits with status 2.
    """
