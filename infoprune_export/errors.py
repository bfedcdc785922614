"""The one exception type for mistakes a user can mend."""

import re

_LINE_BREAKS = re.compile(r"[\n\r\t\v\f\x1c-\x1e\x85\u2028\u2029]+")
# Control characters, which a terminal would obey; marks that turn the direction of writing; halves of characters.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST = 1200


class InfopruneError(Exception):
    """Wrong input or environment.

    The message is one line that names the value, the limit it broke and the fix. The command line prints it and exits
    with code 2; anything else that escapes is a defect of this package and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        # A value quoted from the user's input may hold anything, and be of any length.
        line = _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], _LINE_BREAKS.sub(" ", message))
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 + 7 :]}"
        super().__init__(line)


_NO_MEMORY = (
    "can't allocate memory",  # PyTorch on a CPU
    "not enough memory",
    "out of memory",  # CUDA
    "std::bad_alloc",
    "bad allocation",
    "could not create a primitive",  # oneDNN, which has no room for the code it generates
    "Failed to allocate memory",  # ONNX Runtime
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the CPU or a GPU; libraries say so in words more often than by type."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, Exception) and any(words in str(error) for words in _NO_MEMORY)


def memory_advice(error: BaseException) -> str:
    """What to do about it, in one clause."""
    if "CUDA" in str(error):
        return "use --device cpu, fewer data.calibration_images, or a GPU with more memory"
    return "close other programs, use fewer data.calibration_images, or a machine with more memory"


def is_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C ended the work; pydantic's serialiser makes another error of it when it comes there."""
    return isinstance(error, KeyboardInterrupt) or "KeyboardInterrupt" in str(error)
