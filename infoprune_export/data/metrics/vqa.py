"""VQA accuracy with the normalisation of VQAv2's evaluation, and with EvalAI's of TextVQA and VizWiz.

What the published scripts do was decided by their behaviour, not by their comments (VQAv2: ``vqaEval.py`` of
GT-Vision-Lab/VQA at c4e6a0e; EvalAI: ``m4c_evaluator.py`` of LLaVA, from pythia):

- A punctuation mark that touches a space anywhere in the text is deleted everywhere in it, else it becomes a space. A
  digit, a comma and a digit anywhere in the text delete every mark everywhere. Apostrophe and colon are no marks.
- A period is deleted unless a digit follows; the script's condition on the digit before it is mistyped and never holds.
  Only the first 32 periods go, because the flag ``re.UNICODE``, which is 32, stands where the count belongs.
- Then lower case, number words none and zero to ten, articles, and contractions typed without their apostrophe. Two
  entries of that table stand for themselves (let's, she's), and so "lets" and "shes" stay; "somebody'd" loses its
  apostrophe. Its entries in capitals (I'm, I've) never meet a text in lower case.
- Predictions are always normalised. VQAv2's annotators only lose punctuation, and only where they do not all agree to
  the letter; a space that is left at the end by a deleted mark then stays, and the answer matches nothing.
- EvalAI treats both sides alike, after deleting commas and question marks and setting "'s" apart as a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {word: str(i) for i, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIODS = 32

# Contractions with one apostrophe, typed without it. Not all there are: the table lacks some, such as let's and who're.
_SINGLE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're "
    "there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're "
    "you've"
).split()
# With more than one, typed without one of them.
_DOUBLE = (
    "couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've "
    "something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"
).split()


def _without_one(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = (
    {word.replace("'", ""): word for word in _SINGLE}
    | {typed: word for word in _DOUBLE for typed in _without_one(word)}
    | {"somebody'd": "somebodyd"}
)
_DIGIT_COMMA = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"\.(?!\d)")


def normalize_answer(text: str) -> str:
    """A prediction as VQAv2 compares it."""
    return _words(_strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def normalize_evalai(text: str) -> str:
    """A prediction or an annotator's answer as TextVQA and VizWiz compare it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def _strip_punctuation(text: str) -> str:
    stripped = text
    for mark in _PUNCTUATION:
        deleted = f"{mark} " in text or f" {mark}" in text or _DIGIT_COMMA.search(text)
        stripped = stripped.replace(mark, "" if deleted else " ")
    return _LONE_PERIOD.sub("", stripped, count=_PERIODS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(1, matches / 3), averaged over leaving each annotator out; 0..1. A single annotator is compared directly."""
    if len(set(answers)) > 1:
        answers = [_strip_punctuation(answer) for answer in answers]
    return _leave_one_out(normalize_answer(prediction), answers)


def evalai_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """`vqa_accuracy` with EvalAI's normalisation of both sides."""
    return _leave_one_out(normalize_evalai(prediction), [normalize_evalai(answer) for answer in answers])


def _leave_one_out(predicted: str, answers: Sequence[str]) -> float:
    if len(answers) == 1:
        return float(predicted == answers[0])
    matches = [answer == predicted for answer in answers]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(answers)
