"""Commands about finished runs: the report of one, and two side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from infoprune_export.cli.group import bring_up_to, main, takes_json, takes_recipe, write_json
from infoprune_export.errors import InfopruneError


def _print_report_schema(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        from infoprune_export.validate.report_schema import json_schema

        click.echo(json.dumps(json_schema(), indent=2))
        context.exit()


def _print_compare_schema(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        from infoprune_export.validate.report_compare_schema import json_schema

        click.echo(json.dumps(json_schema(), indent=2))
        context.exit()


@main.command()
@takes_recipe
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_report_schema,
    help="Print the JSON schema of report.json instead.",
)
def report(**options: Any) -> None:
    """Write the report of a run: report.html, and report.json for machines.

    \b
    Example:
      infoprune-export report quickstart
    """
    click.echo(bring_up_to("report", **options) / "report.html")


@main.command()
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Write the comparison as an HTML page."
)
@takes_json
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_compare_schema,
    help="Print the JSON schema of --json instead.",
)
def compare(run_a: Path, run_b: Path, output: Path | None, file: Path | None) -> None:
    """Put two finished runs side by side: settings that differ, sizes, accuracy, parity, latency, verdicts.

    Accuracies are compared question by question where both runs answered the same questions. Milliseconds are
    compared where machine, libraries and threads were the same; speed-ups within each run always are. RUN_A and RUN_B
    are folders of runs.

    \b
    Example:
      infoprune-export compare runs/quickstart runs/mine -o compare.html
    """
    if output is not None and not output.absolute().parent.is_dir():
        raise InfopruneError(f"--output: {output.absolute().parent}: no such folder")
    from infoprune_export.validate.report_compare import compare as compare_runs
    from infoprune_export.validate.report_runs import read_run

    comparison = compare_runs(read_run(run_a), read_run(run_b))
    from infoprune_export.console import wide_console
    from infoprune_export.validate import report_compare_page

    if output is not None:
        from infoprune_export.artifacts import write_text

        write_text(output, report_compare_page.render(comparison))
    console = wide_console()
    for table in report_compare_page.tables(comparison):
        console.print(table)
    for note in report_compare_page.notes(comparison):
        click.echo(f"warning: {note}")
    for line in report_compare_page.headline(comparison):
        click.echo(line)
    write_json(file, comparison.model_dump(mode="json"))
