"""What tasks of lmms-eval ask for: honoured or refused, never ignored."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infoprune_export.errors import InfopruneError
from infoprune_export.lmms.generation import DEFAULT_NEW_TOKENS, Generation, batches, pictures

GREEDY = {"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "image_aspect_ratio": "original"}


def test_greedy_arguments_of_published_tasks_are_taken():
    assert Generation.of({**GREEDY, "max_new_tokens": 32, "until": ["\n\n"]}, "gqa") == Generation(32, ("\n\n",))
    assert Generation.of({}, "gqa") == Generation(DEFAULT_NEW_TOKENS, ())
    assert Generation.of({"until": "###"}, "gqa").until == ("###",)
    assert Generation.of({"do_sample": True, "temperature": 0}, "gqa") == Generation()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"do_sample": True, "temperature": 0.7}, "do_sample = true"),
        ({"do_sample": True, "temperature": None}, "do_sample = true"),
        ({"do_sample": None, "temperature": 0.2}, "temperature = 0.2"),
        ({"num_beams": 3}, "num_beams = 3"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio = 'pad'"),
        ({"repetition_penalty": 1.2}, "'repetition_penalty' is not known"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"max_new_tokens": True}, "max_new_tokens = True"),
        ({"until": [3]}, "until = "),
    ],
)
def test_what_would_be_ignored_is_refused_with_task_and_value(arguments, words):
    with pytest.raises(InfopruneError) as refused:
        Generation.of({**GREEDY, **arguments}, "some_task")
    assert str(refused.value).startswith("task some_task: ")
    assert words in str(refused.value)


def test_answers_end_in_front_of_the_first_stop_text():
    assert Generation(8, ("\n", ".")).cut(" a red cube. It is\nred") == "a red cube"
    assert Generation(8, ()).cut(" a red. cube ") == "a red. cube"


def test_visuals_must_be_images():
    (image,) = pictures([Image.new("L", (4, 4))], "t")
    assert image.mode == "RGB"
    for visuals, words in ((None, "without an image"), ([], "without an image"), (["clip.mp4"], "a visual is str")):
        with pytest.raises(InfopruneError, match=words):
            pictures(visuals, "t")


@given(
    st.lists(st.sampled_from([Generation(8), Generation(16), Generation(8, (".",))]), max_size=30), st.integers(1, 7)
)
def test_batches_hold_every_request_once_with_its_like_in_order(keys, size):
    made = batches(keys, size)
    assert sorted(place for batch in made for place in batch) == list(range(len(keys)))
    for batch in made:
        assert 1 <= len(batch) <= size
        assert batch == sorted(batch)
        assert len({keys[place] for place in batch}) == 1


def test_no_batch_of_nothing():
    with pytest.raises(InfopruneError, match="batch_size = 0"):
        batches([Generation()], 0)
