"""The command line: quick where nothing is computed, and one line and nothing else where something is wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from infoprune_export import __version__
from infoprune_export.cli import main
from infoprune_export.cli.group import read
from infoprune_export.data import testbed
from infoprune_export.recipe import Recipe, assets

ROOT = Path(__file__).parent.parent
TAKES_RECIPE = "run train-gates compress-ffn rewrite export build validate attribute bench first-token report".split()
OTHERS = "recipes doctor parity real-size compare-tokens compare-structure front analyse kit lint compare sweep".split()
SMALL = "data.calibration_images=4 data.validation_questions=4 heads.epochs=1 ffn.method=none variants={}".split()


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def settings(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def assert_refused(result: Result, *named: str) -> str:
    """Exit code 2 and one line on stderr, which names what is wrong."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    message = result.stderr.removesuffix("\n")
    assert message.startswith("error: "), message
    assert message.splitlines() == [message]
    for word in named:
        assert word in message, message
    return message


def entries(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# ── Quick ────────────────────────────────────────────────────────────────────

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "numpy", "PIL", "matplotlib")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["-h"], 0),
        (["--version"], 0),
        (["run", "--help"], 0),
        (["recipes"], 0),
        (["recipes", "quickstart"], 0),
        (["recipes", "--schema"], 0),
        (["run", "nowhere.yaml"], 2),
        (["run", "quickstart", "--set", "heads.remve=0.5"], 2),
        (["run", "quickstart", "--set", "tokens.keep_ratio=0"], 2),
        (["bench", "quickstart", "--set", "x", "--real-size"], 2),
        (["run", "quickstart", "--device", "tpu"], 2),
    ],
)
def test_what_computes_nothing_imports_nothing_heavy(arguments, code, tmp_path):
    script = (
        "import sys; from infoprune_export.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], code or 0, file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == f"[] {code}"
    assert entries(tmp_path) == []


def test_python_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "infoprune_export.cli", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"infoprune-export, version {__version__}\n"


# ── Help ─────────────────────────────────────────────────────────────────────


def test_the_commands_are_those_this_test_knows():
    assert sorted(main.commands) == sorted([*TAKES_RECIPE, *OTHERS])


@pytest.mark.parametrize("name", [*TAKES_RECIPE, *OTHERS])
def test_every_command_has_help_with_examples_that_parse(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    before, _, example = result.stdout.partition("Example:")
    assert len(before.splitlines()) >= 3, "no description"
    lines = re.findall(r"^\s*infoprune-export (.+)$", example, re.MULTILINE)
    assert lines
    for line in lines:
        verb, *arguments = line.partition(" > ")[0].split()
        assert verb == name
        command = main.commands[verb]
        with command.make_context(verb, arguments) as context:
            if context.params.get("recipe") is not None:
                read(context.params["recipe"], context.params["overrides"], context.params["device"])


def test_the_help_lists_every_command_with_a_sentence():
    text = invoke("--help").stdout
    for name in main.commands:
        assert re.search(rf"^\s+{name}\s+[A-Z]\w+", text, re.MULTILINE), name


@pytest.mark.parametrize("name", TAKES_RECIPE)
def test_every_option_is_explained(name):
    for parameter in main.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


# ── recipes ──────────────────────────────────────────────────────────────────


def test_recipes_lists_and_prints_what_is_shipped():
    listing = invoke("recipes").stdout.splitlines()
    assert [line.split()[0] for line in listing] == sorted(assets("recipes"))
    for name, path in assets("recipes").items():
        assert invoke("recipes", name).stdout == path.read_text(encoding="utf-8")


def test_a_printed_recipe_is_one(tmp_path):
    (tmp_path / "mine.yaml").write_text(invoke("recipes", "quickstart").stdout)
    assert_refused(invoke("run", tmp_path / "mine.yaml", "--set", "heads.remve=1"), str(tmp_path / "mine.yaml"))


def test_the_schema_knows_every_key():
    schema = json.loads(invoke("recipes", "--schema").stdout)
    assert set(schema["properties"]) == {field.alias or name for name, field in Recipe.model_fields.items()}
    assert schema["additionalProperties"] is False


def test_recipes_refuses_what_it_cannot_print(tmp_path):
    assert_refused(invoke("recipes", "nothing"), "'nothing'", "quickstart")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert_refused(invoke("recipes", tmp_path / "binary"), str(tmp_path / "binary"))


# ── Mistakes ─────────────────────────────────────────────────────────────────


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where commands run: empty, so that whatever is written shows."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the shipped model, to be spoilt."""
    return shutil.copytree(testbed.checkpoint("testbed/tiny-llava"), tmp_path / "model")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (130, 120), (60 * number, 0, 255)).save(folder / f"{number}.png")
    return folder


def refuse(*arguments: str | Path, place: Path, named: tuple[str, ...], verb: str = "rewrite") -> str:
    """A command that is refused before anything is written."""
    message = assert_refused(invoke(verb, *arguments), *named)
    assert entries(place) == []
    return message


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("heads.remve=0.5", "'heads.remve'; did you mean 'remove'?"),
        ("heads.remove=much", "heads.remove = 'much'"),
        ("heads.epochs=1.5", "heads.epochs = 1.5"),
        ("tokens.keep_ratio=0", "tokens.keep_ratio = 0"),
        ("tokens.keep_ratio=1.5", "tokens.keep_ratio = 1.5"),
        ("heads.remove", "--set 'heads.remove'"),
        ("model=testbed/tiny-llava", "model = 'testbed/tiny-llava'"),
        ("variants={x: {heads.remve: 1}}", "heads.remve"),
        ("data.questions=q.json", "questions and annotations belong together"),
        ("engine.target=toaster", "no target at 'toaster'"),
        ("model.name_or_path=testbed/none", "testbed/tiny-llava"),
        ("model.name_or_path=./none", "./none: no model folder here"),
        ("model.name_or_path=a/b/c", "a/b/c: no model folder here"),
        ("data.images=none", "none: no image folder here"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "export"])
def test_a_wrong_value_is_refused(place, verb, override, named):
    refuse("quickstart", "-o", "out", "--set", override, place=place, named=(named,), verb=verb)


@pytest.mark.parametrize("verb", TAKES_RECIPE)
def test_every_command_refuses_a_missing_recipe(place, verb):
    refuse("nowhere.yaml", place=place, named=("'nowhere.yaml'", "quickstart"), verb=verb)


def test_a_recipe_with_two_mistakes_is_still_one_line(place):
    (place / "mine.yaml").write_text(yaml.safe_dump({"nam": 1, "modle": 2}))
    assert_refused(invoke("run", "mine.yaml"), "mine.yaml")
    assert entries(place) == ["mine.yaml"]


def test_build_refuses_an_unknown_target(place):
    refuse("quickstart", "--target", "toaster", place=place, named=("toaster", "onnxruntime-cpu"), verb="build")


def test_a_wrong_device_is_refused_by_click(place):
    result = invoke("run", "quickstart", "--device", "tpu")
    assert result.exit_code == 2
    assert "'tpu'" in result.stderr
    assert entries(place) == []


def test_cuda_without_a_cuda_device(place):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refuse("quickstart", "--device", "cuda", place=place, named=("'cuda'", "--device cpu"))


# ── Wrong models ─────────────────────────────────────────────────────────────


def _no_vlm(model: Path) -> tuple[str, ...]:
    for path in model.iterdir():
        path.unlink()
    (model / "config.json").write_text('{"model_type": "bert"}')
    return "model_type 'bert'", "supported: llava"


def _no_config(model: Path) -> tuple[str, ...]:
    (model / "config.json").unlink()
    return str(model), "no config.json"


def _damaged_config(model: Path) -> tuple[str, ...]:
    (model / "config.json").write_text("{")
    return str(model / "config.json"), "model_type"


def _binary_config(model: Path) -> tuple[str, ...]:
    (model / "config.json").write_bytes(b"\xff\xfe")
    return (str(model / "config.json"),)


def _listed_config(model: Path) -> tuple[str, ...]:
    (model / "config.json").write_text("[]")
    return (str(model / "config.json"),)


def _only_model_type(model: Path) -> tuple[str, ...]:
    (model / "config.json").write_text('{"model_type": "llava", "text_config": 3}')
    return (str(model),)


def _other_tower(model: Path) -> tuple[str, ...]:
    config = json.loads((model / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] += 1
    (model / "config.json").write_text(json.dumps(config))
    return str(model), "missing"


def _other_width(model: Path) -> tuple[str, ...]:
    config = json.loads((model / "config.json").read_text())
    config["vision_config"]["intermediate_size"] += 8
    (model / "config.json").write_text(json.dumps(config))
    return (str(model),)


def _pickled(model: Path) -> tuple[str, ...]:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    return str(model), "no *.safetensors"


def _edit_tensors(model: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _missing_tensor(model: Path) -> tuple[str, ...]:
    gone: list[str] = []

    def drop(tensors: dict[str, Any]) -> None:
        gone.append(next(name for name in sorted(tensors) if name.endswith("q_proj.weight")))
        del tensors[gone[0]]

    _edit_tensors(model, drop)
    return str(model), "missing tensors", ".".join(gone[0].split(".")[-4:])


def _unknown_tensor(model: Path) -> tuple[str, ...]:
    import torch

    _edit_tensors(model, lambda tensors: tensors.update(surplus=torch.zeros(1)))
    return str(model), "unexpected tensors: surplus"


def _truncated(model: Path) -> tuple[str, ...]:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return str(model), "cannot be loaded"


def _empty(model: Path) -> tuple[str, ...]:
    (model / "model.safetensors").write_bytes(b"")
    return str(model), "cannot be loaded"


def _no_tokenizer(model: Path) -> tuple[str, ...]:
    for path in model.glob("token*"):
        path.unlink()
    return (str(model),)


def _no_template(model: Path) -> tuple[str, ...]:
    (model / "chat_template.jinja").unlink()
    return str(model), "no chat template"


SPOILT = (
    _no_vlm,
    _no_config,
    _damaged_config,
    _binary_config,
    _listed_config,
    _only_model_type,
    _other_tower,
    _other_width,
    _pickled,
    _missing_tensor,
    _unknown_tensor,
    _truncated,
    _empty,
    _no_tokenizer,
    _no_template,
)


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_model_is_refused(place, model, spoil):
    named = spoil(model)
    refuse("quickstart", "-o", "out", *settings(f"model.name_or_path={model}"), place=place, named=named)


@pytest.mark.parametrize("spoil", [_no_vlm, _missing_tensor, _truncated])
def test_an_empty_output_folder_stays_empty(place, model, spoil):
    named = spoil(model)
    (place / "out").mkdir()
    pairs = settings(f"model.name_or_path={model}", *SMALL)
    assert_refused(invoke("rewrite", "quickstart", "-o", "out", *pairs), *named)
    assert entries(place) == ["out"]


def test_a_hub_model_that_cannot_be_reached(place):
    named = ("nobody/nothing",)
    refuse("quickstart", *settings("model.name_or_path=nobody/nothing"), place=place, named=named)


# ── Wrong images ─────────────────────────────────────────────────────────────


def test_a_folder_with_too_few_images_is_refused(place, photos):
    for count in (1, 0):
        for path in sorted(photos.iterdir())[count:]:
            path.unlink()
        (photos / "notes.txt").write_text("no image")
        refuse("quickstart", *settings(f"data.images={photos}"), place=place, named=(f"{count} images", "at least 2"))


@pytest.mark.parametrize("spoil", ["truncated", "text", "empty"])
@pytest.mark.parametrize("which", [0, 3])
def test_a_damaged_image_is_refused_by_name(place, photos, spoil, which):
    path = photos / f"{which}.png"
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "text": b"no image", "empty": b""}[spoil])
    refuse("quickstart", *settings(f"data.images={photos}"), place=place, named=(str(path),))


def test_missing_annotation_files_are_refused_by_name(place, photos, tmp_path):
    pairs = settings(f"data.images={photos}", f"data.questions={tmp_path}/q.json", f"data.annotations={tmp_path}/a")
    refuse("quickstart", *pairs, place=place, named=("data.questions", f"{tmp_path}/q.json", "no such file"))


# ── Outputs that cannot be written ───────────────────────────────────────────


def test_an_output_below_a_file(place):
    (place / "file").write_text("mine")
    for below in ("file/run", "file"):
        assert_refused(invoke("rewrite", "quickstart", "-o", below, *settings(*SMALL)), below, "--output")
    assert entries(place) == ["file"]
    assert (place / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("output", ["/proc/run", "/proc/self/run", "/proc", "/sys"])
def test_an_output_where_nothing_can_be_written(place, output):
    message = refuse("quickstart", "-o", output, *settings(*SMALL), place=place, named=(output, "--output"))
    assert "another run" not in message


def test_a_folder_with_something_else_in_a_stages_place(place):
    (place / "out" / "data").mkdir(parents=True)
    (place / "out" / "data" / "thesis.txt").write_text("mine")
    assert_refused(invoke("rewrite", "quickstart", "-o", "out", *settings(*SMALL)), "out/data", "no finished stage")
    assert (place / "out" / "data" / "thesis.txt").read_text() == "mine"


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_for_tensors(*_: Any, **__: Any) -> None:
    from safetensors import SafetensorError

    # what safetensors says on a real full disk
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("broken", "by"),
    [
        ("pathlib.Path.write_text", _full),
        ("PIL.Image.Image.save", _full),
        ("infoprune_export.training.state.save_file", _full_for_tensors),
    ],
)
def test_a_full_disk_leaves_no_half_stage(place, monkeypatch, broken, by):
    monkeypatch.setattr(broken, by)
    result = invoke("train-gates", "quickstart", "-o", "out", *settings(*SMALL, "heads.method=budgeted"))
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 2, repr(result.exception)
    assert len(errors) == 1
    assert "the disk is full" in errors[0]
    assert result.stderr.rstrip("\n").splitlines()[-1] == errors[0]
    if broken == "infoprune_export.training.state.save_file":
        # The finished data stage stays; what was being made does not take a stage's name.
        assert [name for name in entries(place) if name.count("/") == 1 and "/." not in name] == [
            "out/data",
            "out/recipe.json",
        ]
    else:
        assert entries(place) == []


# ── Environment ──────────────────────────────────────────────────────────────


def test_without_onnx_runtime_nothing_is_begun(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    named = ("onnxruntime cannot be imported", "pip install 'infoprune-export[cpu]'")
    for verb in ("run", "build"):
        refuse("quickstart", "-o", "out", place=place, named=named, verb=verb)


def test_a_target_whose_provider_is_missing(place):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    named = ("onnxruntime-cuda", "CUDAExecutionProvider", "pip install 'infoprune-export[gpu]'")
    refuse("quickstart", "--target", "onnxruntime-cuda", place=place, named=named, verb="build")


# ── What is right ────────────────────────────────────────────────────────────


def test_a_finished_stage_prints_its_folder_and_nothing_else(place):
    for _ in range(2):
        result = invoke("train-gates", "quickstart", "-o", "out", *settings(*SMALL))
        assert result.exit_code == 0, (result.stderr, result.exception)
        assert result.stdout == "out/heads\n"


def test_without_output_the_run_is_named_after_the_recipe(place):
    result = invoke("train-gates", "quickstart", *settings("name=mine", *SMALL))
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert (place / "runs" / "mine" / "heads" / "plan.json").is_file()


@pytest.mark.parametrize("verb", ["train-gates", "run"])
def test_ctrl_c_says_how_to_go_on(place, monkeypatch, verb):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("infoprune_export.data.dataset.draw_scenes", interrupt)
    result = invoke(verb, "quickstart", "-o", "out", *settings(*SMALL))
    assert result.exit_code == 130
    assert "run the same command again" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_defect_keeps_its_traceback(place, monkeypatch):
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("defect")

    monkeypatch.setattr("infoprune_export.data.dataset.draw_scenes", fail)
    result = invoke("rewrite", "quickstart", "-o", "out", *settings(*SMALL))
    assert isinstance(result.exception, ZeroDivisionError)


def test_doctor_prints_json_that_is_json():
    result = invoke("doctor", "--json")
    findings = json.loads(result.stdout)
    assert findings
    assert result.exit_code in (0, 1)
