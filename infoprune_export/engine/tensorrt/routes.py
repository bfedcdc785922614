"""How ``infoprune::TokenSelect`` gets into an engine, seen from the builder: what must be loaded or registered first.

Plugins must be known before the parser meets their node, and a compiled one again before an engine with it is opened.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.errors import InfopruneError

if TYPE_CHECKING:
    from infoprune_export.recipe import Route, TensorRtTarget

_SOURCE = "engines/token_select"
_WITHOUT = "or set token_select to function in the target file: slower, and needs nothing"


def check_route(target: TensorRtTarget, route: Route) -> Path | None:
    """The compiled plugin that a build for the target loads, if its route is one that does.

    Raises:
        InfopruneError: there is none; the message says how it is compiled.
    """
    if route != "plugin":
        return None
    if target.plugin_library is None:
        raise InfopruneError(
            f"target {target.name}: token_select plugin, and no plugin_library is named; compile it with: "
            f"{_compiling(target)}, and set engine.plugin_library to the .so file, {_WITHOUT}"
        )
    library = Path(target.plugin_library)
    if not library.is_file():
        raise InfopruneError(
            f"plugin_library {library}: no such file; compile it with: {_compiling(target)}, {_WITHOUT}"
        )
    return library.absolute()


def _compiling(target: TensorRtTarget) -> str:
    return (
        f"cmake -S {_SOURCE} -B build/token_select -DCMAKE_CUDA_ARCHITECTURES={target.sm} && "
        "cmake --build build/token_select"
    )


def load_library(registry: Any, library: Path, log: Any) -> None:
    """Make a compiled plugin known to a TensorRT registry; a plugin that is known already is left alone.

    Raises:
        InfopruneError: the library does not load, or does not hold the plugin.
    """
    from infoprune_export.engine.tensorrt.prepare import PLUGIN_NAMESPACE, PLUGIN_VERSION, TOKEN_SELECT
    from infoprune_export.engine.tensorrt.progress import last_error

    def known() -> bool:
        return registry.get_creator(TOKEN_SELECT, PLUGIN_VERSION, PLUGIN_NAMESPACE) is not None

    if known():
        return
    if registry.load_library(str(library)) is None or not known():
        raise InfopruneError(
            f"{library}: TensorRT cannot load the plugin {PLUGIN_NAMESPACE}::{TOKEN_SELECT} from it "
            f"({last_error(log)}); compile it against the TensorRT of this machine"
        )


def register_ahead_of_time(trt: Any) -> None:
    """Register the plugin that TensorRT compiles into the engine.

    Raises:
        InfopruneError: this TensorRT has no such plugins.
    """
    try:
        importlib.import_module("tensorrt.plugin")
    except ImportError as error:
        raise InfopruneError(
            f"token_select aot needs tensorrt.plugin, and TensorRT {trt.__version__} here has none ({error}); it came "
            f"with 10.9: set token_select to plugin, {_WITHOUT}"
        ) from None
    importlib.import_module("infoprune_export.engine.tensorrt.plugin")
