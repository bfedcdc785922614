"""Images and what is asked about them, whatever benchmark they come from.

An image is a file, or a few bytes of one: benchmarks come as tables with base64 images in a column. Such an image is a
place in its table and nothing else, so a million of them cost little memory, and they travel to worker processes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from infoprune_export.errors import InfopruneError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class EmbeddedImage:
    """An image as base64 text inside `file`: `length` bytes from byte `offset`. `name` says which row it is."""

    file: Path
    offset: int
    length: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    def read(self) -> bytes:
        """The image file's own bytes.

        Raises:
            InfopruneError: the table is gone or shorter than it was, or the text is no base64.
        """
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                text = file.read(self.length)
        except OSError as error:
            raise InfopruneError(f"{self}: cannot be read ({error.strerror}); put the file back") from None
        try:
            if len(text) < self.length:
                raise ValueError
            return base64.b64decode(text, validate=True)
        except ValueError:
            raise InfopruneError(f"{self}: the image is not base64; download the file again") from None


ImageSource = Path | EmbeddedImage


@dataclass(frozen=True)
class Question:
    """What the model is asked, word for word, and what counts as an answer.

    `answers` are the annotators' (ten in VQAv2) or the one that is right, empty when there are none. `kind` is the
    annotation's type or category. `id` is the benchmark's own. `choices` are the texts of options A, B, ...; then the
    answer is a letter. Questions of one `group` count together in benchmarks that ask for all of them to be right.
    """

    text: str
    answers: tuple[str, ...] = ()
    kind: str = ""
    id: str = ""
    choices: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Sample:
    """One image and everything asked about it."""

    image: ImageSource
    questions: tuple[Question, ...]


def file_of(image: ImageSource) -> Path:
    """The file an image is, or is in."""
    return image if isinstance(image, Path) else image.file


def open_image(image: ImageSource) -> Image.Image:
    """An image in RGB.

    Raises:
        InfopruneError: missing, truncated, or no image at all.
    """
    try:
        with Image.open(image if isinstance(image, Path) else io.BytesIO(image.read())) as opened:
            return opened.convert("RGB")
    except UnidentifiedImageError:
        raise InfopruneError(f"{image}: not an image that Pillow can read; remove or convert it") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InfopruneError(f"{image}: damaged image ({error}); remove or replace it") from None
    except MemoryError:
        # Most often a damaged length: a real one of this size is a decompression bomb to Pillow.
        raise InfopruneError(f"{image}: says that it is larger than memory; remove or replace it") from None


def image_files(folder: Path) -> list[Path]:
    """Every image below `folder`, sorted by name.

    Raises:
        InfopruneError: no such folder.
    """
    if not folder.is_dir():
        raise InfopruneError(f"{folder}: no image folder here; set data.images to a folder of photographs")
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def read_images(folder: Path, prompts: Sequence[str]) -> list[Sample]:
    """Every image below `folder`, sorted by name, each with the same unanswered `prompts`."""
    return [Sample(path, tuple(Question(prompt) for prompt in prompts)) for path in image_files(folder)]
