"""Makes transformers read pruned checkpoints once it and this package are both imported, in either order.

transformers keeps a register of loading methods but has no entry point by which an installed package could ask to be
imported. Importing it from here would cost every command, ``--help`` too, seconds. So nothing is imported: a finder
waits for transformers to import the register and puts one light entry into it. The entry imports
`rewrite.checkpoint`, which takes its place, when transformers meets the first pruned checkpoint.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_REGISTER = "transformers.quantizers.auto"
_READER = "infoprune_export.rewrite.checkpoint"
_METHOD = "infoprune"


def register_with_transformers() -> None:
    """Register now if transformers has its register, else as soon as it has; more than one call changes nothing."""
    if _REGISTER in sys.modules:
        _register(sys.modules[_REGISTER])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # It stays there: to take it out again would make another thread's import that is under way skip a finder.
        sys.meta_path.insert(0, _Finder())


def _register(register: ModuleType) -> None:
    """Imports nothing: the register's import lock is held, and another thread may hold the reader's."""
    # A register of another shape takes no entry, and `import transformers` succeeds all the same.
    with suppress(Exception):
        register.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(_METHOD, _Entry)


class _Entry:
    """Stands in the register until the first pruned checkpoint."""

    @classmethod
    def from_dict(cls, record: dict[str, Any], **options: Any) -> Any:
        """The structure record, by the class that reads it."""
        try:
            config = import_module(_READER).InfopruneConfig
        except Exception as cause:
            from infoprune_export.errors import InfopruneError

            version = getattr(sys.modules["transformers"], "__version__", "unknown")
            raise InfopruneError(
                f"pruned checkpoints cannot be read with transformers {version} ({type(cause).__name__}: {cause}); "
                "install a version the constraints file names"
            ) from cause
        return config.from_dict(record, **options)


class _Finder:
    """Finds the register where the finders behind it do, and adds a call to the end of its import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTER:
            return None
        # What goes wrong here goes wrong again, and is reported, when Python itself asks the other finders.
        with suppress(Exception):
            # Two hooks that ask only those behind them never ask each other in turn.
            for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        followed: Any = _Loader(spec.loader)
                        spec.loader = followed
                    return spec
        return None


class _Loader:
    """Any loader, followed by `_register`."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        # From here on nothing shows that we were there.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register(module)
