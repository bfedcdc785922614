"""Runs the commands of documentation for real, made cheap: tiny models, a dozen questions, three rounds.

What a command is about (methods, budgets, precision, targets, files) is left as it is written. Appended are only
settings of size. Models are replaced: those of the testbed by a few of their blocks, hub ids and paths by the same.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path

import click
from blocks import ROOT, Command
from click.testing import CliRunner, Result
from finished import small_llava, two_blocks

from infoprune_export.cli import main
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import Recipe, load_recipe

CHEAP = (
    "data.calibration_images=8",
    "data.validation_questions=12",
    "heads.epochs=1",
    "heads.rounds=2",
    "ffn.prunenet_episodes=1",
    "recovery.epochs=1",
    "validate.parity_batches=[1]",
    "validate.max_accuracy_drop=100.0",
    "validate.min_agreement=0.0",
    "bench={batch_sizes: [1], rounds: 3, max_rounds: 3, warmup: 0}",
)
"""Sizes and limits of a run that ends in seconds; eight images say nothing about accuracy."""

FEWER: dict[str, Sequence[tuple[tuple[str, ...], str]]] = {
    "analyse": ((("--images",), "4"),),
    "compare-structure": (
        (("--heads", "--ffn"), "magnitude"),
        (("--remove", "--keep"), "0.5"),
        (("--seeds",), "1"),
    ),
    "compare-tokens": ((("--method",), "stride"), (("--keep",), "1/2"), (("--seeds",), "1")),
    "front": ((("--of",), "both"), (("--speed-up",), "1.2")),
    "parity": ((("--every",), "800"),),
}
"""Options that make a command cheap where it gives none of them itself; of several, the first is what is added."""

ALLOWED_EXITS = {"doctor": {0, 1}}
"""Besides 0: what is wrong with this machine's installation is no fault of the page."""


# ── The place ────────────────────────────────────────────────────────────────


def furnish(place: Path) -> None:
    """The files that pages name: models, photographs, a VQAv2 set."""
    small_llava(place / "models" / "llava")
    _small_qwen(place / "models" / "qwen")
    _vqa(place / "vqa")
    for folder in ("photos", "IMAGES"):
        shutil.copytree(place / "vqa" / "images", place / folder)
    for name, source in (("Q.json", "questions.json"), ("A.json", "annotations.json")):
        shutil.copy(place / "vqa" / source, place / name)
    shutil.copy(min((place / "photos").iterdir()), place / "photo.png")
    (place / "recipes").symlink_to(ROOT / "recipes")
    (place / "engines").symlink_to(ROOT / "engines")


def _small_qwen(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = two_blocks(folder.parent)
    made.rename(folder)


def _vqa(folder: Path) -> None:
    """Scenes with their questions in VQAv2's files."""
    from infoprune_export.data import dataset
    from infoprune_export.recipe import DataSpec

    folder.mkdir()
    dataset.draw_scenes(folder, DataSpec(calibration_images=8, validation_questions=12), seed=5)


# ── Parsing ──────────────────────────────────────────────────────────────────


def parse(command: Command) -> tuple[click.Context, Recipe | None]:
    """A command of ours as click understands it, and the recipe it names, checked with its overrides.

    Raises:
        AssertionError: there is no such command, option, recipe, key or value.
    """
    name, *arguments = command.words[1:]
    found = main.get_command(click.Context(main), name)
    assert found is not None, f"{command.where}: there is no command {name}"
    try:
        context = found.make_context(name, list(arguments), parent=click.Context(main))
    except (click.ClickException, InfopruneError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        if command.block.reason is not None and "does not exist" in message:
            return click.Context(found), None  # a file that whoever runs it has
        raise AssertionError(f"{command.where}: {message}") from None
    except click.exceptions.Exit:  # --help, --version
        return click.Context(found), None
    return context, _recipe_of(context, command)


def _recipe_of(context: click.Context, command: Command) -> Recipe | None:
    name = context.params.get("recipe")
    if name is None:
        return None
    if not Path(name).exists() and str(name).endswith(".yaml"):
        name = "quickstart"  # a file that an earlier command of the page writes
    try:
        return load_recipe(name, context.params.get("overrides", ()))
    except InfopruneError as error:
        raise AssertionError(f"{command.where}: {error}") from None


# ── Running ──────────────────────────────────────────────────────────────────


def run(command: Command) -> Result:
    """Run a command of ours in the current folder, and write what it prints where ``>`` says.

    Raises:
        AssertionError: it did not end well.
    """
    context, recipe = parse(command)
    words = [*command.words[1:], *_cheaper(context, recipe)]
    result = CliRunner().invoke(main, words, catch_exceptions=True)
    allowed = ALLOWED_EXITS.get(context.info_name or "", {0})
    assert result.exit_code in allowed, (
        f"{command.where}\nrun as: infoprune-export {shlex.join(words)}\nexit code {result.exit_code}\n"
        f"{result.output[-2000:]}\n{result.exception!r}"
    )
    if command.output is not None:
        Path(command.output).write_text(result.stdout, encoding="utf-8")
    return result


def _cheaper(context: click.Context, recipe: Recipe | None) -> list[str]:
    """What is appended to a command."""
    name, given = context.info_name or "", context.params
    added: list[str] = []
    for options, value in FEWER.get(name, ()):
        by_flag = {flag: p.name for p in context.command.params for flag in p.opts}
        if not any(_given(context, by_flag[option]) for option in options):
            added += [options[0], value]
            if options[1:] and value == "magnitude":
                added += [options[1], value]
    if name == "parity" and not given["families"]:
        added.append("llava")
    if "overrides" in given and recipe is not None:
        settings = [*CHEAP, f"model.name_or_path={_model_for(recipe)}", "model.image_packing=anyres"]
        if name != "sweep":
            settings.append("variants={}")
        if isinstance(recipe.decoder.layer, int) and recipe.decoder.method != "none":
            settings.append("decoder.layer=1")
        added += [word for setting in settings for word in ("--set", setting)]
    return added


def _given(context: click.Context, parameter: str | None) -> bool:
    return context.get_parameter_source(str(parameter)) is click.core.ParameterSource.COMMANDLINE


def _model_for(recipe: Recipe) -> str:
    return "models/qwen" if "qwen" in recipe.model.name_or_path.lower() else "models/llava"


# ── Commands of others ───────────────────────────────────────────────────────


def run_optimum(command: Command, *, parse_only: bool = False) -> None:
    """``optimum-cli export infoprune ...`` in this process, on a tiny model."""
    from infoprune_export.optimum_command import ExportInfopruneCommand

    assert command.words[1:3] == ("export", "infoprune"), command.where
    parser = argparse.ArgumentParser(exit_on_error=False)
    ExportInfopruneCommand.parse_args(parser)
    try:
        arguments = parser.parse_args(list(command.words[3:]))
    except (argparse.ArgumentError, SystemExit) as error:
        raise AssertionError(f"{command.where}: {error}") from None
    if parse_only:
        return
    arguments.model = "models/qwen" if "qwen" in arguments.model else "models/llava"
    from infoprune_export.optimum_command import export

    given = {"precision": arguments.dtype, "images": arguments.images, "opset": arguments.opset}
    message, passed = export(arguments.model, arguments.output, given, arguments.keep_ratio, arguments.tolerance)
    assert passed, f"{command.where}: {message}"


def check_foreign(command: Command) -> None:
    """Targets, files, options and modules that a command of another program names are there.

    Raises:
        AssertionError: one is not, or the program is not known here.
    """
    program, words = command.program, list(command.words[1:])
    if program in ("python", "python3") and words[:1] == ["-m"] and words[1] in ("pip", "pytest"):
        program, *words = words[1:]
    checks = {"make": _make, "pip": _pip, "pytest": _pytest, "cmake": _cmake, "python": _python, "python3": _python}
    if program in ("git", "cd", "source"):
        return
    assert program in checks, f"{command.where}: no test knows {program}; teach this file, or mark the block"
    checks[program](command, words)


def _make(command: Command, words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in words:
        assert f"\n{target}:" in makefile, f"{command.where}: no target {target}"


def _pip(command: Command, words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("command", choices=["install"])
    parser.add_argument("-c")
    parser.add_argument("-e")
    parser.add_argument("requirements", nargs="*")
    options = parser.parse_args(words)
    assert options.c is None or (ROOT / options.c).is_file(), command.where
    for requirement in (*options.requirements, *([options.e] if options.e else [])):
        if found := re.fullmatch(r"(?:infoprune-export|\.)\[([\w,]+)\]", requirement):
            assert set(found[1].split(",")) <= set(extras), f"{command.where}: extras are {', '.join(extras)}"


def _pytest(command: Command, words: list[str]) -> None:
    options = {"-k": 1, "-n": 1, "-m": 1, "--exhaustive": 0, "-q": 0, "--dist": 1}
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if word.startswith("-"):
            assert word in options, f"{command.where}: {word}"
            del remaining[: options[word]]
        else:
            assert (ROOT / word).exists(), f"{command.where}: {word} is not there"


def _cmake(command: Command, words: list[str]) -> None:
    if "-S" in words:
        assert (ROOT / words[words.index("-S") + 1] / "CMakeLists.txt").is_file(), command.where


def _python(command: Command, words: list[str]) -> None:
    from importlib.util import find_spec

    if words[:2] == ["-m", "venv"]:
        return
    if words[0] == "-m":
        assert find_spec(words[1]) is not None, f"{command.where}: no module {words[1]}"
        return
    places = (ROOT / words[0], ROOT / "engines" / "kit" / words[0])
    assert any(place.is_file() for place in places), f"{command.where}: {words[0]} is not there"


def run_python(text: str, where: str) -> None:
    """A Python block, in the current folder."""
    exec(compile(text, where, "exec"), {"__name__": "__docs__"})
