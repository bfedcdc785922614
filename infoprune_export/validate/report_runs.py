"""Finished runs read back from their folders, as far as their reports and scores go; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from infoprune_export.artifacts import MANIFEST, read_manifest, sha256_file, verify
from infoprune_export.errors import InfopruneError
from infoprune_export.validate import report_json
from infoprune_export.validate.report_schema import Report
from infoprune_export.validate.report_schema_base import Count, Part, Sha256, Share

SCORES = "scores.json"
"""Of the validation stage; a run of an earlier version has none."""


class Scores(Part):
    """Score of every question behind every step; see `verdict.question_scores`."""

    questions_sha256: Sha256
    clusters: list[Count]
    """Questions of every image."""
    scores: dict[str, list[Share]]

    @pydantic.model_validator(mode="after")
    def _complete(self) -> Scores:
        if any(len(values) != sum(self.clusters) for values in self.scores.values()):
            raise ValueError("scores of some step are not one for every question")
        return self


@dataclass(frozen=True)
class FinishedRun:
    """A run whose report, validation and data belong together, hash by hash."""

    name: str
    """Of its folder."""
    report: Report
    scores: Scores | None
    data: Mapping[str, str]
    """sha256 of every file of the data stage: the scenes, or the list of the user's own files with theirs."""
    model: Mapping[str, Any]
    """What the original was: sha256 of its files, or hub id and revision."""


def read_run(folder: Path) -> FinishedRun:
    """A finished run.

    Raises:
        InfopruneError: no run folder, no finished report in it, a damaged file, another schema version, or a report
            that was written of other results than are there now.
    """
    if not (folder / "recipe.json").is_file():
        what = "not a run's folder (it has no recipe.json)" if folder.is_dir() else "no such folder"
        raise InfopruneError(f"{folder}: {what}; name one that infoprune-export run wrote, such as runs/quickstart")
    manifest = _finished(folder / "report", f"{folder}: unfinished, it has no report")
    if report_json.REPORT_JSON not in manifest["outputs"]:
        raise InfopruneError(
            f"{folder}: its report was written by an earlier version, without {report_json.REPORT_JSON}; write it "
            "again with infoprune-export report"
        )
    verify(folder / "report", manifest)
    report = report_json.read(folder / "report" / report_json.REPORT_JSON)
    found = {stage: _described(folder / stage, report) for stage in ("validation", "data", "baseline")}
    verify(folder / "validation", found["validation"])
    scores = None
    if SCORES in found["validation"]["outputs"]:
        scores = _scores(folder / "validation" / SCORES)
    return FinishedRun(
        name=folder.resolve().name,
        report=report,
        scores=scores,
        data=found["data"]["outputs"],
        model=found["baseline"]["inputs"].get("model", {}),
    )


def _finished(folder: Path, otherwise: str) -> dict[str, Any]:
    if (manifest := read_manifest(folder)) is None:
        raise InfopruneError(f"{otherwise}; bring it to its end with infoprune-export run")
    return manifest


def _described(folder: Path, report: Report) -> dict[str, Any]:
    """The manifest of a stage that the report was written of."""
    manifest = _finished(folder, f"{folder}: the stage is missing")
    stated = report.artefacts.get(folder.name)
    if stated is None or stated.manifest_sha256 != sha256_file(folder / MANIFEST):
        raise InfopruneError(
            f"{folder}: not what the report was written of; bring the run up to date with infoprune-export report"
        )
    return manifest


def _scores(path: Path) -> Scores:
    try:
        return Scores.model_validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InfopruneError(
            f"{path}: {where}: {first['msg']}; make it again with infoprune-export validate --force"
        ) from None
