"""The command line: parse, call one function, print. Help and recipe errors import neither torch nor transformers."""

from infoprune_export.cli import measuring_commands, recipe_commands  # noqa: F401  (they add themselves to the group)
from infoprune_export.cli.group import main, quiet_libraries

__all__ = ["main", "quiet_libraries"]
