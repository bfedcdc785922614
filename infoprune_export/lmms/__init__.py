"""lmms-eval's tasks on our models: a finished run, a pruned checkpoint, or any supported model as it came.

lmms-eval finds `manifests` through the entry point group ``lmms_eval.models``; nothing of it is imported before. Then

::

    python -m lmms_eval eval --model infoprune --model_args run=runs/quickstart --tasks gqa --batch_size 16
"""

from __future__ import annotations

from typing import Any

MODEL = "infoprune"
_CLASS = "infoprune_export.lmms.model.InfopruneModel"


def manifests() -> list[Any]:
    """What lmms-eval's registry asks for, ``ModelManifest`` each."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id=MODEL, simple_class_path=_CLASS)]
