"""Multiple choice: which option an answer means.

ScienceQA as in LLaVA's ``eval_science_qa.py``: the answer, line ends read as ". ", is a letter from A to E; or begins
with a letter, a period and a space; or says "The answer is" and a letter, one with a period behind it first. A letter
that the question has no option for is wrong.

MMBench by the rules of VLMEvalKit, without its last resort, a language model, and without its list of refusals of
commercial services: `.()[],:;!*#{}` become spaces, and if exactly one of the option letters is a word of the answer,
among its last four, that is it; Z and no such letter means none; otherwise exactly one option whose text occurs in the
answer, lower case. What is neither is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SAYS_AND_STOPS = re.compile(r"The answer is ([A-E])\.")
_SAYS = re.compile(r"The answer is ([A-E])")
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4


def scienceqa_letter(text: str, options: int) -> str:
    """The letter that is meant, empty if none of the first `options` is."""
    text = text.replace("\n", ". ")
    found = ""
    if text.strip() in tuple("ABCDE"):
        found = text.strip()
    elif text[1:3] == ". " and text[0] in "ABCDE":
        found = text[0]
    elif match := _SAYS_AND_STOPS.search(text) or _SAYS.search(text):
        found = match.group(1)
    return found if found in tuple(LETTERS[:options]) else ""


def mmbench_letter(text: str, choices: Sequence[str]) -> str:
    """The letter that is meant, empty if none is."""
    letters = LETTERS[: len(choices)]
    words = text.translate(_SEPARATORS).split()
    named = [letter for letter in letters if letter in words]
    if not named and "Z" in words:
        return ""
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    lower = text.lower()
    told = [letter for letter, choice in zip(letters, choices, strict=True) if choice.lower() in lower]
    return told[0] if len(told) == 1 else ""
