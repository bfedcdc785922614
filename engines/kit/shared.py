"""What all scripts of a kit share: refusals, the manifest and its hashes, golden cases, files written whole."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any, Callable

import numpy as np

FOLDER = Path(__file__).resolve().parent
PLAN, RECORD, REPORT = "engine.plan", "engine.json", "report.json"
SCHEMA_VERSION = 1


class KitError(Exception):
    """Something is wrong with the kit or the machine, so nothing was judged. One line, exit code 2."""


def run(main: Callable[[], int]) -> None:
    """Ends the process: 0 done or passed, 1 failed, 2 refused."""
    try:
        code = main()
    except KitError as error:
        print("refused: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2
    sys.exit(code)


# ── Files ────────────────────────────────────────────────────────────────────


def sha256(path: Path) -> str:
    """Of a file, read in pieces: weights may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, fix: str) -> Any:
    """The content of a JSON file; `fix` says what to do where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise KitError(f"{path.name}: missing or not valid JSON; {fix}") from None


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step: it is never there in part."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise KitError(f"{path.name}: cannot be written ({error.strerror}); free some space or move the kit") from None
    finally:
        if partial.exists():
            partial.unlink()


def write_json(path: Path, value: Any) -> None:
    write(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_kit() -> tuple[dict[str, Any], str]:
    """The manifest and its sha256, after every file of the kit has been compared with it."""
    manifest = read_json(FOLDER / "manifest.json", "copy the whole kit again")
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        raise KitError("manifest.json: written for other scripts; copy the whole kit again")
    for name, expected in sorted(manifest["files"].items()):
        path = FOLDER / name
        if not path.is_file():
            raise KitError(f"{name}: missing; copy the whole kit again")
        actual = sha256(path)
        if actual != expected:
            raise KitError(
                f"{name}: changed (sha256 {actual[:12]}, manifest says {expected[:12]}); copy the whole kit again"
            )
    return manifest, sha256(FOLDER / "manifest.json")


def read_engine(manifest: dict[str, Any], kit: str) -> tuple[bytes, dict[str, Any]]:
    """The plan and its record, if they belong together and to this kit."""
    record = read_json(FOLDER / RECORD, "run build.py first")
    try:
        texts = [record["kit"], record["plan_sha256"], record["plugin_sha256"], *record["compatibility"].values()]
        level, built = record["profile_level"], {"tensorrt", "sm"} <= record["compatibility"].keys()
    except (KeyError, TypeError, AttributeError):
        built = False
    if not built or type(level) is not int or not all(isinstance(text, str) for text in texts):
        raise KitError(f"{RECORD}: not written by this kit's build.py; run build.py again")
    if record["kit"] != kit or not 0 <= level < len(manifest["profiles"]):
        raise KitError(f"{RECORD}: the engine was built from another kit; run build.py again")
    try:
        plan = (FOLDER / PLAN).read_bytes()
    except OSError:
        raise KitError(f"{PLAN}: missing; run build.py again") from None
    actual = hashlib.sha256(plan).hexdigest()
    if actual != record["plan_sha256"]:
        raise KitError(
            f"{PLAN}: truncated or changed (sha256 {actual[:12]}, {RECORD} says {record['plan_sha256'][:12]}); "
            "run build.py again"
        )
    return plan, record


# ── Golden cases ─────────────────────────────────────────────────────────────


def read_case(case: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Arrays of one golden case, by kind (``input``, ``output``, ``replay``) and name."""
    arrays: dict[str, dict[str, np.ndarray]] = {"input": {}, "output": {}, "replay": {}}
    try:
        with np.load(FOLDER / case["file"], allow_pickle=False) as stored:
            for key in stored.files:
                kind, _, name = key.partition(".")
                arrays[kind][name] = stored[key]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        raise KitError(f"{case['file']}: cannot be read; copy the whole kit again") from None
    return arrays


def outside(profile: dict[str, Any], inputs: dict[str, np.ndarray]) -> str:
    """Which input does not fit the profile, in one line; empty if all do."""
    for name, value in inputs.items():
        low, high = profile[name]["min"], profile[name]["max"]
        if len(low) != value.ndim or any(not a <= n <= b for a, n, b in zip(low, value.shape, high)):
            return f"{name} is {list(value.shape)}, the engine takes {low} to {high}"
    return ""
