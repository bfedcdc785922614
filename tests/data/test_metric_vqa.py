"""VQA accuracy: hand-worked cases, and 300 hostile strings against a second, literal reading of the published rules."""

from __future__ import annotations

import random

import pytest

from infoprune_export.data.metrics.vqa import evalai_accuracy, normalize_answer, normalize_evalai, vqa_accuracy

# ── Metric ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("matches", "expected"),
    [
        (0, 0.0),
        (1, (1 * 0 + 9 * 1 / 3) / 10),
        (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (3, (3 * 2 / 3 + 7 * 1) / 10),
        (4, 1.0),
        (9, 1.0),
    ],
)
def test_vqa_accuracy_leaves_each_annotator_out(matches: int, expected: float):
    answers = ["dog"] * matches + [f"cat {i}" for i in range(10 - matches)]
    assert vqa_accuracy("dog", answers) == pytest.approx(expected)
    assert vqa_accuracy("dog", answers[::-1]) == pytest.approx(expected)


def test_vqa_accuracy_of_three_in_ten_is_nine_tenths():
    assert vqa_accuracy("dog", ["dog"] * 3 + ["cat"] * 7) == pytest.approx(0.9)


def test_vqa_accuracy_of_unanimous_answers_is_one_or_zero():
    assert vqa_accuracy("yes", ["yes"] * 10) == 1.0
    assert vqa_accuracy("no", ["yes"] * 10) == 0.0


def test_vqa_accuracy_of_a_single_annotator_is_equality():
    assert vqa_accuracy("Yes.", ["yes"]) == 1.0
    assert vqa_accuracy("no", ["yes"]) == 0.0


def test_vqa_accuracy_normalises_the_prediction():
    assert vqa_accuracy("The Dog.", ["dog"] * 10) == 1.0
    assert vqa_accuracy("Two", ["2"] * 10) == 1.0


def test_vqa_accuracy_strips_punctuation_of_annotators_only_where_they_disagree():
    # as the official script does
    assert vqa_accuracy("hot dog", ["hot-dog"] * 10) == 0.0
    assert vqa_accuracy("hot dog", ["hot-dog"] * 9 + ["sausage"]) == 1.0


def test_vqa_accuracy_of_an_empty_prediction_is_zero():
    assert vqa_accuracy("", ["yes"] * 10) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("  a dog ", "dog"),
        ("The man and an umbrella", "man and umbrella"),
        ("theater", "theater"),
        ("none", "0"),
        ("Zero", "0"),
        ("ten", "10"),
        ("twenty one", "twenty 1"),
        ("someone", "someone"),
        ("1,000", "1000"),
        ("1,000 dollars (us)", "1000 dollars us"),
        ("hello, world", "hello world"),
        ("hello,world", "hello world"),
        ("red-white", "red white"),
        ("red -white", "red white"),
        ("well -known-ish", "well knownish"),
        ("well- known-ish", "well knownish"),
        ("what?", "what"),
        ("yes!", "yes"),
        ("1/2", "1 2"),
        ('"stop"', "stop"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("u.s.a.", "usa"),
        ("p.m", "pm"),
        ("dont", "don't"),
        ("Isnt", "isn't"),
        ("don't", "don't"),
        ("twas", "'twas"),
        ("dog's", "dog's"),
        ("black\nand\twhite", "black and white"),
        ("\tyes\n", "yes"),
        ("yes  no", "yes no"),
        ("the", ""),
        ("", ""),
        ("?", ""),
    ],
)
def test_normalize_answer_follows_the_official_rules(text: str, expected: str):
    assert normalize_answer(text) == expected


# ── The published rules, written down a second time ──────────────────────────

# Typed form and what it becomes, all of the table. In capitals are its entries that no lower-case text can meet.
TABLE = """
aint ain't|arent aren't|cant can't|couldve could've|couldnt couldn't|couldn'tve couldn't've|couldnt've couldn't've
didnt didn't|doesnt doesn't|dont don't|hadnt hadn't|hadnt've hadn't've|hadn'tve hadn't've|hasnt hasn't|havent haven't
hed he'd|hed've he'd've|he'dve he'd've|hes he's|howd how'd|howll how'll|hows how's|Id've I'd've|I'dve I'd've|Im I'm
Ive I've|isnt isn't|itd it'd|itd've it'd've|it'dve it'd've|itll it'll|let's let's|maam ma'am|mightnt mightn't
mightnt've mightn't've|mightn'tve mightn't've|mightve might've|mustnt mustn't|mustve must've|neednt needn't
notve not've|oclock o'clock|oughtnt oughtn't|ow's'at 'ow's'at|'ows'at 'ow's'at|'ow'sat 'ow's'at|shant shan't
shed've she'd've|she'dve she'd've|she's she's|shouldve should've|shouldnt shouldn't|shouldnt've shouldn't've
shouldn'tve shouldn't've|somebody'd somebodyd|somebodyd've somebody'd've|somebody'dve somebody'd've
somebodyll somebody'll|somebodys somebody's|someoned someone'd|someoned've someone'd've|someone'dve someone'd've
someonell someone'll|someones someone's|somethingd something'd|somethingd've something'd've
something'dve something'd've|somethingll something'll|thats that's|thered there'd|thered've there'd've
there'dve there'd've|therere there're|theres there's|theyd they'd|theyd've they'd've|they'dve they'd've
theyll they'll|theyre they're|theyve they've|twas 'twas|wasnt wasn't|wed've we'd've|we'dve we'd've|weve we've
werent weren't|whatll what'll|whatre what're|whats what's|whatve what've|whens when's|whered where'd|wheres where's
whereve where've|whod who'd|whod've who'd've|who'dve who'd've|wholl who'll|whos who's|whove who've|whyll why'll
whyre why're|whys why's|wont won't|wouldve would've|wouldnt wouldn't|wouldnt've wouldn't've|wouldn'tve wouldn't've
yall y'all|yall'll y'all'll|y'allll y'all'll|yall'd've y'all'd've|y'alld've y'all'd've|y'all'dve y'all'd've|youd you'd
youd've you'd've|you'dve you'd've|youll you'll|youre you're|youve you've
"""
CONTRACTED = dict(pair.split() for pair in TABLE.strip().replace("\n", "|").split("|"))
MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
AS_NUMBER = {"none": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}
AS_NUMBER |= {"eight": 8, "nine": 9, "ten": 10}


def is_digit(letter: str) -> bool:
    return letter != "" and letter.isdecimal()


def published(text: str) -> str:
    """Letter by letter and without regular expressions, rule after rule."""
    text = "".join(" " if letter in "\n\t" else letter for letter in text).strip()
    padded = f"{text}\0\0"
    has_digit_comma = any(
        is_digit(a) and b == "," and is_digit(c) for a, b, c in zip(padded, padded[1:], padded[2:], strict=False)
    )
    pairs = {first + second for first, second in zip(text, text[1:], strict=False)}
    gone = {mark for mark in MARKS if has_digit_comma or {f"{mark} ", f" {mark}"} & pairs}
    spaced = "".join("" if letter in gone else " " if letter in MARKS else letter for letter in text)
    kept, periods = [], 0
    for letter, following in zip(spaced, f"{spaced[1:]} ", strict=False):
        if letter == "." and not is_digit(following) and periods < 32:
            periods += 1
        else:
            kept.append(letter)
    words = []
    for word in "".join(kept).lower().split():
        known = str(AS_NUMBER[word]) if word in AS_NUMBER else word
        if known not in ("a", "an", "the"):
            words.append(CONTRACTED.get(known, known))
    return " ".join(words)


def hostile_strings() -> list[str]:
    """300, seeded: everything the rules look at, put together at random, and every entry of the table once."""
    rng = random.Random(6)
    atoms = [*MARKS, ".", ".", ",", "'", ":", "’", " ", " ", " ", "\n", "\t", "\r", "\u00a0", "\u2003"]
    atoms += ["1", "23", "٣", "²", "1,000", "3.5", ".5", "5.", "-1", "10-20", "U.S.A.", "x,y", "a/b", "(x)", "[[y]]"]
    atoms += ["a", "An", "THE", "none", "Two", "ten", "eleven", "dont", "Im", "let's", "lets", "dog", "Hot-Dog"]
    atoms += ["cat's", "İ", "ß", "naïve", "日本", "...", "é.", "😀"]
    periods = ["." * 31, "." * 32, "." * 33, "." * 40 + "5", "a. " * 40, "1." * 40 + "x."]
    strings = dict.fromkeys([*CONTRACTED, "", " ", "\n", *periods])
    while len(strings) < 300:
        strings["".join(rng.choice(atoms) + rng.choice(["", "", " "]) for _ in range(rng.randint(1, 9)))] = None
    return list(strings)


def test_300_hostile_strings_normalise_as_published():
    strings = hostile_strings()
    assert len(strings) == len(set(strings)) == 300
    wrong = [(s, normalize_answer(s), published(s)) for s in strings if normalize_answer(s) != published(s)]
    assert wrong == []


def test_the_hostile_strings_reach_every_rule():
    """A rule that no string needs would not be tested by them."""
    strings = hostile_strings()
    assert sum(published(s) != s for s in strings) > 250
    assert any(len(s) - len(s.replace(".", "")) > 32 and "." in published(s) for s in strings)
    for sign in ("٣,", "\u00a0", "İ", "²", "\r"):
        assert any(sign[0] in s for s in strings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lets", "lets"),
        ("let's", "let's"),
        ("shes", "shes"),
        ("somebody'd", "somebodyd"),
        ("somebodyd", "somebodyd"),
        ("Im", "im"),
        ("ive", "ive"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yall'd've", "y'all'd've"),
        ("don-t", "don t"),
        ("dont!", "don't"),
        ("none of the 1,000 (or two)!", "0 of 1000 or 2"),
        ("a-b c -d", "ab c d"),
        ("a-b,c", "b c"),
        ("1,000/2-3", "100023"),
        ("1 , 000", "1 000"),
        ("3.5.", "3.5"),
        ("3.a5", "3a5"),
        (".5", ".5"),
        ("." * 33, "."),
        ("x" + "." * 32, "x"),
        ("x" + "." * 34, "x.."),
        ("12:30", "12:30"),
        ("’twas", "’twas"),
        ("one\u00a0two", "1 2"),
        ("the a an", ""),
        ("a.", ""),
        ("ten.", "10"),
        ("t.h.e", ""),
        ("1.0", "1.0"),
        ("٣,٣-x", "٣٣x"),
        ("[{(dog)}]", "dog"),
        ("yes\tno", "yes no"),
    ],
)
def test_interactions_worked_by_hand(text: str, expected: str):
    assert normalize_answer(text) == published(text) == expected


def test_annotators_who_differ_lose_punctuation_only():
    # "Dog" keeps its capital, and a mark at the end leaves its space, as in the published script
    assert vqa_accuracy("dog", ["Dog"] * 9 + ["cat"]) == 0.0
    assert vqa_accuracy("dog", ["dog !"] * 9 + ["cat"]) == 0.0
    assert vqa_accuracy("dog", ["dog!"] * 9 + ["cat"]) == 0.0
    assert vqa_accuracy("dog", ["do-g"] * 9 + ["cat"]) == 0.0
    assert vqa_accuracy("2", ["two"] * 9 + ["3"]) == 0.0
    assert vqa_accuracy("dont", ["don't"] * 9 + ["no"]) == 1.0
    assert vqa_accuracy("yes", ["yes."] * 9 + ["no"]) == 1.0
    assert vqa_accuracy("yes", ["yes."] * 10) == 0.0


# ── EvalAI ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dog's", "dog 's"),
        ("it's", "it 's"),
        ("1,000", "1000"),
        ("1,000-2", "1000 2"),
        ("what?", "what"),
        ("a, b", "b"),
        ("Hello,world", "helloworld"),
        ("The Two.", "2"),
        ("dont", "don't"),
        ("Unanswerable.", "unanswerable"),
        ("\tYes\n", "yes"),
        ("red-white", "red white"),
        ("", ""),
    ],
)
def test_evalai_by_hand(text: str, expected: str):
    assert normalize_evalai(text) == expected


def test_evalai_of_hostile_strings_is_the_published_rules_behind_three_replacements():
    for text in hostile_strings():
        first = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
        assert normalize_evalai(text) == published(first)


def test_evalai_normalises_both_sides_even_where_annotators_agree():
    assert evalai_accuracy("two", ["The 2."] * 10) == 1.0
    assert vqa_accuracy("two", ["The 2."] * 10) == 0.0
    assert evalai_accuracy("hot dog", ["Hot-Dog"] * 3 + ["sausage"] * 7) == pytest.approx(0.9)
    assert evalai_accuracy("x", ["y"] * 10) == 0.0
