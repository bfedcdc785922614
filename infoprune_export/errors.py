"""The one exception type for mistakes a user can mend."""


class InfopruneError(Exception):
    """Wrong input or environment.

    The message is one line that names the value, the limit it broke and the fix. The command line prints it and exits
    with code 2; anything else that escapes is a defect of this package and keeps its traceback.
    """
