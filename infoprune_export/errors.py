"""The one exception type for mistakes a user can mend."""

import re

_LINE_BREAKS = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")


class InfopruneError(Exception):
    """Wrong input or environment.

    The message is one line that names the value, the limit it broke and the fix. The command line prints it and exits
    with code 2; anything else that escapes is a defect of this package and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        # A value quoted from the user's input may hold line breaks.
        super().__init__(_LINE_BREAKS.sub(" ", message))
