"""The command line: parse, call one function, print. Help and recipe errors import neither torch nor transformers."""

from infoprune_export.cli import (  # noqa: F401  (they join the group)
    attribution_commands,
    bench_commands,
    engine_commands,
    measuring_commands,
    recipe_commands,
    report_commands,
    structure_commands,
    study_commands,
    token_commands,
)
from infoprune_export.cli.group import main

__all__ = ["main"]
