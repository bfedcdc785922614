"""The command line: parse, call one function, print. Help and recipe errors import neither torch nor transformers."""

from infoprune_export.cli import measuring_commands, recipe_commands, token_commands  # noqa: F401  (they join the group)
from infoprune_export.cli.group import main

__all__ = ["main"]
