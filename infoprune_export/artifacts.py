"""Artefact folders: written beside their place, renamed when whole, checked by hash when read.

A folder of a run is finished exactly when it has a ``manifest.json``. The manifest says what made the folder (a key
over recipe slice, library versions and upstream manifests) and the sha256 of every file in it. It holds no time and
no path, so the same inputs give the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from infoprune_export.errors import InfopruneError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_LIBRARIES = ("infoprune-export", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy")


def canonical_json(value: Any) -> str:
    """Sorted keys, two spaces, trailing newline: equal values give equal bytes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries whose results a run depends on."""
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def fingerprint(path: Path) -> dict[str, str]:
    """sha256 of a file, or of every file below a folder, by relative name."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {str(p.relative_to(path)) if path.is_dir() else p.name: sha256_file(p) for p in files}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into one line for the user."""
    try:
        yield
    except InfopruneError:
        raise
    except Exception as error:
        if _is_full(path, error):
            raise InfopruneError(f"{path}: the disk is full; free some space and run the same command again") from error
        if isinstance(error, OSError) and error.errno in _FORBIDDEN:
            raise InfopruneError(
                f"{path}: not writable ({error.strerror}); choose another folder with --output"
            ) from error
        if isinstance(error, OSError) and (error.errno in _OF_THE_DISK or _is_short(error)):
            raise InfopruneError(
                f"{path}: cannot be written ({error.strerror or error}); choose another disk with --output"
            ) from error
        raise


_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# A limit of the file system or the shell, a name too long, a disk that fails or went away.
_OF_THE_DISK = (errno.EFBIG, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN)


def _is_short(error: OSError) -> bool:
    """Whether NumPy wrote a part of an array: a limit, of whatever kind, as it gives no errno."""
    return error.errno is None and " requested and " in str(error)


def _is_full(path: Path, error: Exception) -> bool:
    """Whether a failed write is the disk's fault; safetensors, NumPy and ONNX Runtime do not say so by errno."""
    if getattr(error, "errno", None) in _FULL or "No space left on device" in str(error):
        return True
    if isinstance(error, OSError) and "problem writing element" in str(error):
        return True
    existing = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    disk = shutil.disk_usage(existing)
    return disk.total > 0 and disk.free < 64 * 1024


def check_writable(folder: Path) -> None:
    """Refuse an existing folder in which no file can be made."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InfopruneError(
            f"{folder}: not writable ({error.strerror}); choose another folder with --output"
        ) from error


def make_folder(path: Path) -> None:
    """``mkdir -p`` whose failure is the user's to mend: a file in the way, a read-only disk, a name too long."""
    with writing(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in _FULL + _FORBIDDEN:
                raise
            raise InfopruneError(
                f"{path}: no folder can be made here ({error.strerror}); choose another with --output"
            ) from error


@contextlib.contextmanager
def staged(folder: Path, *, keep: bool = False) -> Iterator[Path]:
    """A hidden sibling of `folder` to write in; it takes `folder`'s name when the block ends without an error.

    With ``keep`` the sibling survives an error or a kill and is handed out again next time, so that long work can
    resume from what it left there; otherwise it starts empty and an error removes it.
    """
    staging, retired = _beside(folder)
    clear_leftovers(folder, keep=keep)
    make_folder(staging)
    try:
        with writing(folder), _watching(folder, staging):
            yield staging
            if os.path.lexists(folder):
                # rename cannot replace a folder that has files in it
                folder.rename(retired)
                try:
                    staging.rename(folder)
                except BaseException:
                    retired.rename(folder)
                    raise
                remove(retired)
            else:
                staging.rename(folder)
    except BaseException:
        if not keep:
            remove(staging)
        raise


def clear_leftovers(folder: Path, *, keep: bool = False) -> None:
    """Remove what a killed `staged` of this folder left beside it; with ``keep`` all but work that can go on."""
    staging, retired = _beside(folder)
    # A kill between the two renames leaves the old folder under this name.
    remove(retired)
    # A link here would have the work written, and what is there removed, in another folder.
    if not keep or staging.is_symlink() or staging.is_file():
        remove(staging)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where a folder is made, and where the one it replaces waits for its removal."""
    return folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.retired")


@contextlib.contextmanager
def _watching(folder: Path, staging: Path) -> Iterator[None]:
    """Turn the loss of the folder that is being written into one line: another program removed or moved it."""
    try:
        yield
    except InfopruneError:
        raise
    except Exception as error:
        if os.path.lexists(staging) or folder.exists():
            raise
        raise InfopruneError(
            f"{folder}: what was being written here has vanished; leave {folder.parent} alone and run the same "
            "command again"
        ) from error


def remove(path: Path) -> None:
    """Remove a folder, file or link, as far as that can be done; what a link points at stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            # Never through a link that was put here.
            remove(partial)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
    finally:
        remove(partial)


def write_manifest(folder: Path, *, stage: str, key: str, inputs: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Describe every file now in `folder`; call it last."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "key": key,
        "inputs": dict(inputs),
        "recipe": dict(recipe),
        "libraries": library_versions(),
        "outputs": {name: digest for name, digest in fingerprint(folder).items() if name != MANIFEST},
    }
    write_text(folder / MANIFEST, canonical_json(manifest))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, or None when the folder was never finished.

    Raises:
        InfopruneError: the manifest itself is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["schema_version"] != SCHEMA_VERSION:
            raise InfopruneError(
                f"{path}: schema_version {manifest['schema_version']}, this version reads {SCHEMA_VERSION}; "
                f"delete {folder} to make it again"
            )
        if not all(isinstance(manifest[name], dict) for name in ("inputs", "outputs", "recipe")):
            raise TypeError
        if not all(isinstance(text, str) for text in (manifest["key"], *manifest["outputs"].values())):
            raise TypeError
    except OSError as error:
        raise InfopruneError(
            f"{path}: cannot be read ({error.strerror}); make it readable, or delete {folder}"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InfopruneError(f"{path}: corrupt manifest; delete {folder} to make it again") from None
    return dict(manifest)


def verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check every file of a finished folder against its manifest.

    Raises:
        InfopruneError: a file is missing, its bytes changed, or it lies elsewhere; the message names it.
    """
    for name, expected in manifest["outputs"].items():
        path = folder / name
        try:
            inside, there = path.resolve().is_relative_to(folder.resolve()), path.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, a character no name has, links that go round
            inside = there = False
        if not inside:
            raise InfopruneError(
                f"{folder / MANIFEST}: {name!r:.80} is no file of its folder; delete {folder} to make it again"
            )
        if not there:
            raise InfopruneError(f"{path}: artefact is missing; delete {folder} to make it again")
        if (actual := sha256_file(path)) != expected:
            raise InfopruneError(
                f"{path}: artefact is corrupt (sha256 {actual[:12]}, manifest says {expected[:12]}); "
                f"delete {folder} to make it again"
            )
