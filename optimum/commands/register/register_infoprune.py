"""Adds ``optimum-cli export infoprune``: optimum imports every file of this namespace (PEP 420, so no __init__.py)."""

from optimum.commands.export.base import ExportCommand

from infoprune_export.optimum_command import ExportInfopruneCommand

REGISTER_COMMANDS = [(ExportInfopruneCommand, ExportCommand)]
