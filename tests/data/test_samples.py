"""Images: files, and rows of tables."""

from __future__ import annotations

import base64
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infoprune_export.data.samples import EmbeddedImage, Question, file_of, open_image, read_images
from infoprune_export.errors import InfopruneError


def save_image(path: Path, size: int = 12) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def one_line_error(action, *mentions: object) -> None:
    """`action` raises `InfopruneError` in one line that mentions all of these."""
    with pytest.raises(InfopruneError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for mention in mentions:
        assert str(mention) in message


# ── Rows of tables ───────────────────────────────────────────────────────────


def embedded(path: Path, text: bytes) -> EmbeddedImage:
    path.write_bytes(b"header\n" + text + b"\nmore")
    return EmbeddedImage(path, 7, len(text), "row 3")


def test_an_embedded_image_opens_as_its_file_does_also_in_another_process(tmp_path: Path):
    save_image(tmp_path / "a.png")
    image = embedded(tmp_path / "t.tsv", base64.b64encode((tmp_path / "a.png").read_bytes()))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        opened = pool.submit(open_image, image).result()
    assert opened.tobytes() == open_image(tmp_path / "a.png").tobytes()
    assert (image.name, file_of(image), file_of(tmp_path / "a.png")) == (
        "row 3",
        tmp_path / "t.tsv",
        tmp_path / "a.png",
    )


@pytest.mark.parametrize("text", [b"%%%%", b"abc", b"QUJD\xff"])
def test_an_embedded_image_that_is_no_base64_is_named_with_its_row(tmp_path: Path, text: bytes):
    one_line_error(lambda: open_image(embedded(tmp_path / "t.tsv", text)), tmp_path / "t.tsv", "row 3", "not base64")


def test_base64_of_something_else_is_no_image(tmp_path: Path):
    image = embedded(tmp_path / "t.tsv", base64.b64encode(b"not an image"))
    one_line_error(lambda: open_image(image), tmp_path / "t.tsv", "row 3", "not an image")


def test_a_table_that_was_cut_or_is_gone_is_named(tmp_path: Path):
    save_image(tmp_path / "a.png")
    image = embedded(tmp_path / "t.tsv", base64.b64encode((tmp_path / "a.png").read_bytes()))
    (tmp_path / "t.tsv").write_bytes((tmp_path / "t.tsv").read_bytes()[:40])
    one_line_error(lambda: open_image(image), tmp_path / "t.tsv", "row 3")
    (tmp_path / "t.tsv").unlink()
    one_line_error(lambda: open_image(image), tmp_path / "t.tsv", "cannot be read")


# ── Files ────────────────────────────────────────────────────────────────────


def test_read_images_lists_every_image_sorted_with_its_prompts(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "folder.png").mkdir()
    for name in ("z.PNG", "a.jpeg", "b/c.bmp", "notes.txt"):
        save_image(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("x")
    samples = read_images(tmp_path, ("Describe.", "Count."))
    assert [str(sample.image.relative_to(tmp_path)) for sample in samples] == [
        "a.jpeg",
        str(Path("b", "c.bmp")),
        "z.PNG",
    ]
    assert samples[0].questions == (Question("Describe."), Question("Count."))


def test_missing_image_folder_is_named(tmp_path: Path):
    one_line_error(lambda: read_images(tmp_path / "none", ()), tmp_path / "none", "data.images")
    (tmp_path / "file.png").touch()
    one_line_error(lambda: read_images(tmp_path / "file.png", ()), tmp_path / "file.png")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_open_image_converts_every_mode_to_rgb(tmp_path: Path, mode: str):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (5, 4)).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (5, 4))


def test_missing_image_file_is_named(tmp_path: Path):
    one_line_error(lambda: open_image(tmp_path / "gone.png"), tmp_path / "gone.png")


@pytest.mark.parametrize("content", [b"", b"hello, I am a text file"], ids=["empty", "text"])
def test_text_named_png_is_no_image(tmp_path: Path, content: bytes):
    path = tmp_path / "text.png"
    path.write_bytes(content)
    one_line_error(lambda: open_image(path), path, "not an image")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_truncated_image_is_named_wherever_it_ends(tmp_path: Path, suffix: str):
    path = tmp_path / f"cut.{suffix}"
    save_image(path)
    content = path.read_bytes()
    opened = 0
    for length in range(0, len(content) - 24, 3):  # the last bytes of a PNG carry no pixels
        path.write_bytes(content[:length])
        one_line_error(lambda: open_image(path), path)
        opened += 1
    assert opened > 20


def test_png_with_a_wrong_byte_opens_or_is_named(tmp_path: Path):
    path = tmp_path / "flipped.png"
    save_image(path)
    content = path.read_bytes()
    refused = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            mode, message = open_image(path).mode, ""
        except InfopruneError as error:
            mode, message = "", str(error)
            refused += 1
        assert mode == "RGB" or (str(path) in message and len(message.splitlines()) == 1)
    assert refused > len(content) / 2


def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_image(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    one_line_error(lambda: open_image(tmp_path / "large.png"), tmp_path / "large.png", "damaged image")
