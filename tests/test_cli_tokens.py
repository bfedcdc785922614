"""Commands that look at visual tokens and first tokens: what they print and write, and how they refuse."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from finished import STAGE_2, finished, small

from infoprune_export.cli import main
from infoprune_export.cli.group import read

ROOT = Path(__file__).parent.parent
COMMANDS = ("first-token", "compare-tokens", "analyse")
FEW = ("data.calibration_images=1", "data.validation_questions=14", "data.scene_sizes=mixed")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def settings(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where commands run: empty, so that whatever is written shows."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refuse(place: Path, *arguments: str | Path, named: tuple[str, ...]) -> None:
    """Exit code 2, one line on stderr that names what is wrong, and nothing written."""
    result = invoke(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    message = result.stderr.removesuffix("\n")
    assert message.startswith("error: ")
    assert message.splitlines() == [message]
    for part in named:
        assert part in message, message
    assert list(place.rglob("*")) == []


# ── Parsing ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_and_its_example_parses(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    command = main.commands[name]
    assert all(parameter.help for parameter in command.params if isinstance(parameter, click.Option))
    (line,) = re.findall(r"^\s*infoprune-export (.+)$", result.stdout.partition("Example:")[2], re.MULTILINE)
    verb, *arguments = line.split()
    assert verb == name
    with command.make_context(verb, arguments) as context:
        read(context.params["recipe"], context.params["overrides"], context.params["device"])


def test_what_computes_nothing_imports_nothing_heavy(place):
    calls = [
        [name, *rest] for name in COMMANDS for rest in (["--help"], ["nowhere.yaml"], ["quickstart", "--set", "x"])
    ]
    script = (
        "import sys; from infoprune_export.cli import main\n"
        f"for arguments in {calls!r}:\n"
        "    try: main(arguments)\n"
        "    except SystemExit as end: assert end.code == (0 if '--help' in arguments else 2), arguments\n"
        "heavy = ('torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'PIL', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines()[-1] == "[]"
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere.yaml"], ("'nowhere.yaml'", "quickstart")),
        (["quickstart", "--set", "tokens.keep_ratio=0"], ("tokens.keep_ratio = 0",)),
        (["quickstart", "--set", "decoder.layer=last"], ("decoder.layer = 'last'", "auto")),
        (["quickstart", "--set", "model.name_or_path=testbed/none"], ("testbed/none", "testbed/tiny-llava")),
        (["quickstart", "--set", "data.images=none"], ("none: no image folder here",)),
    ],
)
def test_a_wrong_recipe_is_refused(place, name, arguments, named):
    refuse(place, name, *arguments, named=named)


@pytest.mark.parametrize("name", ["first-token", "compare-tokens"])
def test_json_in_a_missing_folder_is_refused_before_any_work(place, name):
    refuse(place, name, "quickstart", "--json", "none/result.json", named=("--json", str(place / "none"), "no such"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["first-token", "quickstart", "--device", "tpu"], "tpu"),
        (["first-token", "quickstart", "--json", "."], "directory"),
        (["compare-tokens", "quickstart", "--seeds", "0"], "--seeds"),
        (["compare-tokens", "quickstart", "--force"], "--force"),
        (["analyse", "quickstart", "--images", "0"], "--images"),
        (["analyse", "quickstart", "--what", "colours"], "increments"),
        (["analyse"], "RECIPE"),
    ],
)
def test_wrong_options_are_refused_by_click(place, arguments, named):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert named in result.stderr
    assert list(place.iterdir()) == []


# ── first-token ──────────────────────────────────────────────────────────────


@pytest.fixture
def built(tmp_path_factory, tmp_path) -> tuple[Path, list[str]]:
    """A copy of a finished run, and the settings that it is up to date with."""
    folder = finished(tmp_path_factory)
    return shutil.copytree(folder, tmp_path / "run"), settings(*small(folder.parent), *STAGE_2)


def test_first_token_compares_the_ends_of_a_run(built, place):
    folder, own = built
    result = invoke("first-token", "quickstart-qwen", *own, "-o", folder, "--no-memory", "--json", "result.json")
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads((place / "result.json").read_text())
    sides = ["unpruned", "compressed", "compressed, Stage 2"]
    assert [row["side"] for row in found["rows"]] == sides
    assert [row["batch_size"] for row in found["rows"]] == [1] * 3
    whole, *rest = [row["visual_tokens"] for row in found["rows"]]
    assert rest == [-(-whole // 2)] * 2
    for row in found["rows"]:
        assert f"{row['milliseconds']['p50']:.1f}" in result.stdout
        assert "peak_bytes" not in row
    assert "answers of the original" not in result.stdout, "what was there was used"


@pytest.mark.exhaustive
def test_first_token_without_stage_2_builds_no_more_than_it_needs(built, place):
    """A run without a decoder section, whose decoder stage was never made."""
    folder, own = built
    for stage in ("decoder", "accuracy", "validation"):
        shutil.rmtree(folder / stage)
    own += settings("decoder.method=none")
    result = invoke("first-token", "quickstart-qwen", *own, "-o", folder, "--no-memory", "--json", "result.json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert [row["side"] for row in json.loads((place / "result.json").read_text())["rows"]] == [
        "unpruned",
        "compressed",
    ]
    assert not (folder / "decoder").exists()


def test_the_encoder_runs_with_the_threads_that_are_reported(built, monkeypatch):
    from infoprune_export.validate import first_token_models

    threads = []

    def spy(model, target, number=None):
        threads.append(number)
        return original(model, target, number)

    original = first_token_models.open_session
    monkeypatch.setattr(first_token_models, "open_session", spy)
    contest = first_token_models.contest_of_run(built[0])
    assert threads == [1, 1]
    assert list(contest.sides) == ["unpruned", "compressed", "compressed, Stage 2"]


def test_first_token_at_real_size_refuses_what_cannot_be_exported(place):
    named = ("tokens.method = 'stride'", "cannot be exported")
    refuse(place, "first-token", "quickstart", "--real-size", "--set", "tokens.method=stride", named=named)


# ── compare-tokens ───────────────────────────────────────────────────────────


def test_compare_tokens_prints_and_writes_a_row_for_every_method_and_share(place):
    chosen = ["--method", "stride", "--method", "decoder:fastv", "--keep", "1/2", "--keep", "0.25"]
    result = invoke("compare-tokens", "quickstart-qwen", *settings(*FEW), *chosen, "--json", "rows.json")
    assert result.exit_code == 0, (result.output, result.exception)
    rows = json.loads((place / "rows.json").read_text())
    methods = ["infoprune", "stride", "decoder:fastv"]
    assert [(row["method"], row["keep"]) for row in rows] == [
        ("none", "1"),
        *((name, share) for share in ("1/2", "1/4") for name in methods),
    ]
    for row in rows:
        assert re.search(rf"{row['method']}\b.*{row['accuracy']['percent']:.1f} ±", result.stdout), row
    assert [path.name for path in place.iterdir()] == ["rows.json"]


def test_options_reach_the_comparison(place, monkeypatch):
    from infoprune_export.validate import compare_tokens

    def spy(recipe, methods, ratios, track, *, seeds):
        asked.append((recipe.name, recipe.device, tuple(methods), list(map(str, ratios)), seeds))
        return []

    asked: list[tuple] = []
    monkeypatch.setattr(compare_tokens, "compare_tokens", spy)
    monkeypatch.setattr(compare_tokens, "render", lambda rows: "")
    invoke("compare-tokens", "quickstart")
    invoke("compare-tokens", "quickstart", "--seeds", "7", "--device", "cpu", "--method", "pool", "--keep", "0.3")
    assert asked == [
        ("quickstart", "auto", compare_tokens.ALL, ["1/2", "2/9", "1/9"], 3),
        ("quickstart", "cpu", ("pool",), ["3/10"], 7),
    ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--method", "fastvlm"], ("'fastvlm'", "divprune", "decoder:fastv")),
        (["--method", "decoder:none"], ("'decoder:none'", "decoder:infoprune")),
        (["--method", ""], ("method ''",)),
        (["--keep", "0"], ("0", "(0, 1]")),
        (["--keep", "3/2"], ("3/2", "(0, 1]")),
        (["--keep", "half"], ("half",)),
        (["--keep", "1/0"], ("1/0",)),
        (["--keep", "1e-99999999"], ("1e-99999999",)),
        (["--set", "tokens.prior=cls"], ("tokens.prior = 'cls'",)),
    ],
)
def test_compare_tokens_refuses_what_it_does_not_know(place, arguments, named):
    refuse(place, "compare-tokens", "quickstart-qwen", *settings(*FEW), *arguments, named=named)


# ── analyse ──────────────────────────────────────────────────────────────────


def test_analyse_offers_every_analysis_there_is():
    from infoprune_export.analysis.analyse import WHAT

    (what,) = (option for option in main.commands["analyse"].params if option.name == "what")
    assert tuple(what.type.choices) == WHAT


def test_analyse_writes_a_page_with_what_was_asked_for(place):
    result = invoke("analyse", "quickstart-qwen", *settings(*FEW), "--what", "maturity", "--images", "2")
    assert result.exit_code == 0, (result.output, result.exception)
    folder = Path("runs") / "quickstart-qwen-analysis"
    assert result.stdout == f"analysis: {folder / 'index.html'}\n"
    assert sorted(path.name for path in folder.iterdir()) == ["analysis.json", "index.html", "maturity.svg"]
    found = json.loads((folder / "analysis.json").read_text())
    assert found["images"] == 2
    assert len(found["maturity"]["agreement"]) == 4
    assert "increments" not in found


def test_analyse_never_replaces_something_else(place):
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("mine")
    result = invoke("analyse", "quickstart-qwen", *settings(*FEW), "--images", "1", "-o", "mine")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert str(place / "mine") in result.stderr
    assert [path.name for path in (place / "mine").iterdir()] == ["thesis.txt"]


def test_analyse_refuses_a_selection_that_the_model_cannot_take(place):
    wrong = settings(*FEW, "tokens.prior=cls")
    refuse(place, "analyse", "quickstart-qwen", *wrong, "--what", "kept", named=("tokens.prior = 'cls'",))
