"""The section about data: which images and questions calibrate, and which validate."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from infoprune_export.recipe.base import Spec, tuple_of_list

FormatName = Literal["vqav2", "textvqa", "gqa", "pope", "mme", "mmbench", "mmbench_cn", "scienceqa", "vizwiz"]
"""Names of `data.formats.FORMATS`."""

_FILES = ("images", "questions", "annotations")
_NEEDED: dict[str, dict[str, str]] = {
    "vqav2": {
        "images": "the folder of images",
        "questions": "the question file",
        "annotations": "the annotation file",
    },
    "textvqa": {"images": "the folder of images", "questions": "TextVQA_0.5.1_val.json"},
    "gqa": {"images": "the folder of images", "questions": "testdev_balanced_questions.json"},
    "pope": {"images": "the folder val2014", "questions": "the folder with coco_pope_*.json, or one of them"},
    "mme": {"images": "the folder MME_Benchmark_release"},
    "mmbench": {"questions": "the TSV file"},
    "mmbench_cn": {"questions": "the TSV file"},
    "scienceqa": {
        "images": "the folder of images",
        "questions": "problems.json",
        "annotations": "pid_splits.json",
    },
    "vizwiz": {"images": "the folder of images", "questions": "val.json"},
}


class DataSpec(Spec):
    """Images and questions for calibration and validation; an image is used for one of the two, never both.

    Without `images`, procedural scenes are drawn. With `images` alone, calibration distils features and validation
    counts how often both models give the same answer to `prompts`. With `questions`, calibration uses the answers and
    validation the benchmark's own metric.
    """

    format: FormatName | None = None
    """The benchmark whose released files `images`, `questions` and `annotations` are. Without it, questions and
    annotations are VQAv2's, asked as they stand."""
    images: str | None = None
    """A folder."""
    questions: str | None = None
    """A file (POPE: also a folder)."""
    annotations: str | None = None
    """VQAv2: the annotation file. ScienceQA: ``pid_splits.json``. TextVQA with `ocr_tokens`: the file with them."""
    hub: str | None = None
    """Instead of files: a data set of Hugging Face's hub in the form of ``lmms-lab``'s releases, or a local folder with
    its parquet files. Only as many rows as are needed are fetched, in their order there. Needs the extra ``hub``."""
    revision: str | None = None
    """Of the data set on the hub."""
    split: str | None = None
    """Of the data set on the hub, or of ScienceQA's ``pid_splits.json``. By default the one that is published on."""
    instruction: str | None = None
    """Put behind every question. By default what LLaVA's scripts put there if `format` is named, else nothing."""
    ocr_tokens: bool = False
    """TextVQA: give the reference OCR tokens in the prompt, as LLaVA's script does. Accuracies with and without are not
    comparable."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Of an answer. By default 8, or 16 where `format` is named."""
    prompts: Annotated[tuple[str, ...], BeforeValidator(tuple_of_list)] = ("Describe the image.",)
    """Asked about images that have no questions."""
    calibration_images: int = Field(448, ge=1)
    """At most so many; of fewer images half calibrates."""
    validation_questions: int = Field(2000, ge=1)
    """Questions that belong together are all asked or none, so that there may be a few less."""
    calibration_from: str | None = None
    """A folder of images to calibrate on instead, without labels. Then all images of the benchmark validate."""
    calibration_style: Literal["same", "plain", "grayscale", "noise"] = "same"
    """How procedural scenes to calibrate on are drawn: as those that validate, without texture, clutter and noise,
    without colour, or with strong noise."""
    scene_sizes: Literal["square", "mixed"] = "square"
    """Sizes of the procedural scenes: 112 x 112 pixels, or one of seven sizes of about that area for each scene."""
    workers: int = Field(0, ge=0)
    """Processes that read and prepare images while the model answers; 0 for none. No result depends on it."""

    @model_validator(mode="after")
    def _complete(self) -> DataSpec:
        if not self.prompts:
            raise ValueError("prompts is empty: give at least one question")
        if self.format is None:
            self._check_unnamed()
        else:
            self._check_named(self.format)
        for name, value in (("split", self.split), ("revision", self.revision)):
            if value is not None and self.hub is None and not (name == "split" and self.format == "scienceqa"):
                raise ValueError(f"{name} = {value!r} belongs to hub, or split to format scienceqa; leave it out")
        if self.ocr_tokens and self.format != "textvqa":
            raise ValueError("ocr_tokens belongs to format textvqa; leave it out")
        if not self.drawn and self.calibration_style != "same":
            raise ValueError(
                f"calibration_style = {self.calibration_style!r} is about drawn scenes; calibrate on other images with "
                "calibration_from"
            )
        if self.calibration_from is not None and self.calibration_style != "same":
            raise ValueError("calibration_from and calibration_style exclude each other: leave one out")
        return self

    def _check_unnamed(self) -> None:
        if self.hub is not None:
            raise ValueError("hub needs format: name the benchmark whose data set it is")
        if (self.questions is None) != (self.annotations is None):
            raise ValueError("questions and annotations belong together: give both VQAv2 files or neither")
        if self.questions is not None and self.images is None:
            raise ValueError("questions need images: name the folder their image ids refer to")
        if self.instruction is not None and self.questions is None:
            raise ValueError("instruction is put behind a benchmark's questions; write prompts in full instead")

    def _check_named(self, name: str) -> None:
        given = {key: getattr(self, key) for key in _FILES}
        if self.hub is not None:
            if extra := [key for key, value in given.items() if value is not None]:
                raise ValueError(f"hub brings images and questions: leave {' and '.join(extra)} out")
            return
        needed = dict(_NEEDED[name])
        if self.ocr_tokens and name == "textvqa":
            needed["annotations"] = "TextVQA_Rosetta_OCR_v0.2_val.json, for ocr_tokens"
        if missing := [f"{key} ({what})" for key, what in needed.items() if given[key] is None]:
            raise ValueError(f"format {name} needs {' and '.join(missing)}, or hub")
        if extra := [key for key, value in given.items() if value is not None and key not in needed]:
            raise ValueError(f"format {name} has no {' and '.join(extra)}: leave it out")

    @property
    def drawn(self) -> bool:
        """Whether scenes are drawn."""
        return self.format is None and self.images is None

    @property
    def made(self) -> bool:
        """Whether the data stage brings images itself, drawn or fetched."""
        return self.drawn or self.hub is not None

    @property
    def benchmark(self) -> FormatName | None:
        """Whose metric counts; None for images without questions. Scenes are scored as VQAv2."""
        if self.format is None and (self.drawn or self.questions is not None):
            return "vqav2"
        return self.format

    def to_slice(self) -> dict[str, Any]:
        """What results depend on, plain JSON types."""
        return self.model_dump(mode="json", exclude={"workers"})
