"""A sharded checkpoint's index, looked at before transformers opens whatever files it names."""

from __future__ import annotations

import json
from pathlib import Path

from infoprune_export.errors import InfopruneError


def check_shards(folder: Path) -> None:
    """Refuse an index that names a file which is missing, or is no file name (the hub's cache has links inside).

    Raises:
        InfopruneError: as said, or the index is damaged.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if not names or not all(isinstance(name, str) for name in names):
                raise TypeError
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InfopruneError(f"{index}: no index of safetensors shards; copy the checkpoint again") from None
        for name in sorted(names):
            if name in (".", "..") or any(sign in name for sign in "/\\\0"):
                raise InfopruneError(
                    f"{index}: shard {name!r:.80} lies outside of {folder}; do not use this checkpoint"
                )
            try:
                there = (folder / name).is_file()
            except OSError:  # a name too long to be one
                there = False
            if not there:
                raise InfopruneError(
                    f"{folder}: shard {name!r:.80} is missing, which {index.name} names; copy it again"
                )
