"""``optimum-cli export infoprune``: through optimum's own entry point."""

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from infoprune_export.models import tower_of
from infoprune_export.models.vlm import VLM
from infoprune_export.models.zoo import TINY, random_model
from infoprune_export.optimum_command import _dummy_inputs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small pruned checkpoint."""
    from infoprune_export.data import testbed
    from infoprune_export.rewrite.checkpoint import save

    model = testbed.build_model(layers=2, hidden_size=32, heads=4, seed=3)
    tower = tower_of(model)
    tower.blocks[0].keep_heads([0, 2, 3])
    tower.blocks[0].keep_neurons(range(64))
    folder = tmp_path_factory.mktemp("model")
    save(model, testbed.build_processor(), tower, folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where commands run: empty, so that whatever is written shows."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(monkeypatch, capsys):
    """``optimum-cli export infoprune`` in this process; returns exit code, stdout and stderr."""
    from optimum.commands import optimum_cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "infoprune", *map(str, arguments)])
        code = 0
        try:
            optimum_cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_pruned_model_with_token_selection(model, place):
    """As a user does it: one line, one folder, nothing else."""
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "infoprune", "--model", model, "out"]
    done = subprocess.run(
        [*command, "--keep-ratio", "16/64", "--opset", "19"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    for words in (f"{place / 'out'}: fp32, opset 19", "1/4 of the visual tokens", "allowed 1e-04"):
        assert words in done.stdout
    assert [name for name in written(place) if "/" not in name] == ["out"]
    assert {"config.json", "model.onnx", "model.onnx.data", "processor_config.json"} <= set(written(place / "out"))
    graph = onnx.load(place / "out" / "model.onnx", load_external_data=False).graph
    assert [output.name for output in graph.output] == ["image_features", "kept_indices"]


@pytest.mark.parametrize(
    ("dtype", "element", "says"),
    [
        ("fp16", onnx.TensorProto.FLOAT16, "allowed 3e-02"),
        pytest.param("bf16", onnx.TensorProto.BFLOAT16, "opset 22", marks=pytest.mark.exhaustive),
    ],
)
def test_dtypes(cli, model, place, dtype, element, says):
    (place / "out").mkdir()
    code, out, err = cli("-m", model, "--dtype", dtype, "out")
    assert (code, err) == (0, "")
    assert says in out
    assert ("not compared" in out) == (dtype == "bf16")
    graph = onnx.load(place / "out" / "model.onnx", load_external_data=False).graph
    assert graph.input[0].type.tensor_type.elem_type == graph.output[0].type.tensor_type.elem_type == element


def test_what_differs_is_not_written(cli, model, place):
    code, out, err = cli("-m", model, "out", "--tolerance", "1e-12")
    assert (code, out) == (1, "")
    assert err.startswith("FAIL: on 1 example image(s), ONNX Runtime and PyTorch differ by ")
    assert err.endswith("out was not written\n")
    assert len(err.splitlines()) == 1
    assert written(place) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--opset", "30", "out"], "--opset 30"),
        (["--dtype", "bf16", "--opset", "20", "out"], "--opset 20: ONNX has no bf16 convolution"),
        (["--keep-ratio", "3", "out"], "--keep-ratio '3': 3 is outside (0, 1]"),
        (["--keep-ratio", "half", "out"], "--keep-ratio 'half'"),
        (["--tolerance", "0", "out"], "--tolerance 0.0"),
        (["."], ".: there is something here already"),
        (["/"], "/: there is something here already"),
        (["-m", "./none", "out"], "./none: no model folder here"),
        (["-m", "testbed/none", "out"], "testbed/tiny-llava"),
    ],
)
def test_a_mistake_is_one_line(cli, model, place, arguments, named):
    code, out, err = cli("-m", model, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert named in err
    assert written(place) == []


def test_a_folder_in_use_is_left_alone(cli, model, place):
    (place / "thesis.txt").write_text("mine")
    for output in (".", "thesis.txt"):
        code, _, err = cli("-m", model, output)
        assert code == 2
        assert "there is something here already" in err
    assert written(place) == ["thesis.txt"]


def test_a_family_without_an_adapter(cli, place):
    (place / "bert").mkdir()
    (place / "bert" / "config.json").write_text('{"model_type": "bert"}')
    code, _, err = cli("-m", place / "bert", "out")
    assert code == 2
    assert "'bert'" in err
    assert written(place) == ["bert", "bert/config.json"]


@pytest.mark.parametrize("family", TINY)
def test_dummy_inputs_fit_every_family(family):
    """optimum's generator is used where its images are what the tower takes, and leaves the random state alone."""
    import torch

    tower = tower_of(model := random_model(family, 3))
    state = torch.random.get_rng_state()
    cases = dict(_dummy_inputs(VLM(model, None, tower)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ("optimum's dummy images" in cases) == (family in ("llava", "llava-siglip"))
    for inputs in cases.values():
        tower.check_inputs(inputs)
