"""Transformers' own exporter, as a contender of the sweep: used as its guide says, and only where it is available."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from infoprune_export.engine.onnxruntime import session_options
from infoprune_export.errors import InfopruneError
from infoprune_export.models import tower_of
from infoprune_export.models.packing import Grid
from infoprune_export.models.qwen import QwenTower
from infoprune_export.models.tower import Inputs
from infoprune_export.models.zoo import random_model
from infoprune_export.recipe import load_target
from infoprune_export.validate.sweep_cases import Case, Features, model_features

PEERS = ("transformers",)
# Where graphs run, the peer's and ours.
TARGET = "onnxruntime-cpu"
THREADS = 1


class Peer:
    """A model whose modules are what the exporter made: each component of the vision path is exported, dynamic.

    The exported graphs then stand in for the modules, so that what is left to the caller between components is done by
    the model's own code; precomputed inputs come from the exporter's helper.
    """

    def __init__(self, family: str) -> None:
        self._model = random_model(family)
        tower, generator = tower_of(self._model), torch.Generator().manual_seed(0)
        grids: list[Grid] = [(1, 16, 24)] * 2
        inputs = (
            tower.grid_inputs(grids, generator) if isinstance(tower, QwenTower) else tower.example_inputs(2, generator)
        )
        options = session_options(load_target(TARGET), THREADS)
        replace_modules(self._model, inputs, options)

    def serves(self, case: Case) -> bool:
        return True

    def run(self, inputs: Inputs) -> Features:
        return model_features(self._model, inputs)


def replace_modules(model: Any, inputs: Inputs, options: Any, device: str = "cpu") -> None:
    """Put exports in the place of a model's image encoder and projector, in sessions with these options.

    `inputs` are traced with. They should be of two images of one size, all windows whole: of the samples that can be
    traced these fix least; one image alone would fix the number of images.
    """
    from transformers.exporters import exporter_dynamo
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    # Named after its file, so transformers' verbosity does not reach it.
    logging.getLogger(exporter_dynamo.__file__).setLevel(logging.ERROR)
    # A refusal is counted; that ONNX Runtime prints it as well helps nobody.
    options.log_severity_level = 4
    for module in (model.get_encoder(modality="image"), getattr(model.model, "multi_modal_projector", None)):
        if module is not None:
            # Its progress is printed, and no setting of it is quiet.
            with contextlib.redirect_stdout(io.StringIO()):
                exported = OnnxExporter().export(module, _sample(model, module, inputs), OnnxConfig(dynamic=True))
            stand_in = exported.to(device, session_options=options)
            module.forward = partial(_stand_in, module, module.forward, stand_in)


def _sample(model: Any, module: Any, inputs: Inputs) -> dict[str, Any]:
    """What a module of the model is called with for these images."""
    calls: list[dict[str, Any]] = []
    hook = module.register_forward_pre_hook(
        lambda _, arguments, named: calls.append(_named(module.forward, arguments, named)), with_kwargs=True
    )
    with hook, torch.no_grad():
        model.get_image_features(**inputs)
    return calls[0]


def _stand_in(module: Any, forward: Callable[..., Any], exported: Any, *arguments: Any, **named: Any) -> Any:
    """The exported graph, called the way the module is."""
    from transformers.exporters.utils import precompute_export_inputs

    inputs = _named(forward, arguments, named)
    precompute_export_inputs(module, inputs)
    return exported(**inputs)


def _named(function: Callable[..., Any], arguments: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(function)
    bound: dict[str, Any] = {}
    for name, value in signature.bind(*arguments, **named).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            bound |= value
        else:
            bound[name] = value
    return bound


def examine_peer(name: str) -> dict[str, Any]:
    """A peer's version, and the reason why it is not available, or None.

    Raises:
        InfopruneError: no such peer.
    """
    if name not in PEERS:
        raise InfopruneError(f"no peer {name!r}; there are: {', '.join(PEERS)}")
    reason = None
    try:
        # Exports that can be called came later than exporters.
        from transformers.exporters.base import ExportedModel  # noqa: F401
        from transformers.exporters.exporter_onnx import OnnxExporter

        OnnxExporter()
    except Exception as error:  # (a missing or outdated package of its own too, whatever it raises)
        reason = one_line(error)
    return {"name": name, "version": version_of(name), "not_available": reason}


def version_of(package: str) -> str | None:
    """An installed package's version, or None."""
    # onnxruntime-gpu, for one, is installed under another name than it is imported by.
    with contextlib.suppress(Exception):
        return version(package)
    return None


def one_line(error: Exception) -> str:
    """An error as it is counted and printed."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
