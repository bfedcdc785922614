"""Memory that runs out, on a CPU or a GPU, is one line with the stage; every other error keeps its traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.progress import Progress

from infoprune_export.cli import main
from infoprune_export.cli.group import _Group
from infoprune_export.errors import InfopruneError, is_out_of_memory
from infoprune_export.pipeline import Run, Stage, execute
from infoprune_export.recipe import Recipe


def run(folder: Path, error: BaseException | None) -> Path:
    def make(run: Run, folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        if error is not None:
            raise error

    recipe = Recipe.model_validate({"name": "t", "model": {"name_or_path": "x"}})
    stage = Stage("heads", "", (), lambda recipe: {}, make, uses_model=False)
    return execute(Run(recipe, folder, Progress(disable=True)), {"heads": stage}, "heads")


def torch_error() -> RuntimeError:
    """What PyTorch really raises on a CPU."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    return caught.value


CPU = "close other programs, use fewer data.calibration_images"
CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 7.44 GiB"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (MemoryError(), CPU),
        (torch_error, CPU),
        (torch.OutOfMemoryError(CUDA), "use --device cpu"),
        (RuntimeError("CUDA error: out of memory"), "use --device cpu"),
        (RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested"), CPU),
        (RuntimeError("std::bad_alloc"), CPU),
        (RuntimeError("could not create a primitive"), CPU),
    ],
)
def test_memory_that_runs_out_names_the_stage_and_a_way_on(tmp_path, error, advice):
    raised = error() if callable(error) else error
    (tmp_path / "run").mkdir()
    with pytest.raises(InfopruneError) as caught:
        run(tmp_path / "run", raised)
    message = str(caught.value)
    assert message.startswith("heads: out of memory; ")
    assert advice in message
    assert "run the same command again to resume" in message
    assert caught.value.__cause__ is raised
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "recipe.json"]
    assert (run(tmp_path / "run", None) / "half.txt").read_text() == "half"


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes (3,) and (4,) differ"), KeyError("memory"), AssertionError(), TypeError("allocate")]
)
def test_a_defect_stays_what_it_is(tmp_path, error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught:
        run(tmp_path / "run", error)
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoryError(), 2, "error: out of memory; close other programs"),
        (torch.OutOfMemoryError(CUDA), 2, "error: out of memory; use --device cpu"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume"),
        # What pydantic makes of Ctrl-C while it serialises.
        (ValueError("Error calling function `str`: KeyboardInterrupt: "), 130, "interrupted; run the same"),
        (ZeroDivisionError(), 1, ""),
    ],
)
def test_the_end_of_a_command_outside_of_a_stage(monkeypatch, error, code, line):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("infoprune_export.recipe.assets", fail)
    assert isinstance(main, _Group)
    result = CliRunner().invoke(main, ["recipes"])
    assert result.exit_code == code, result.exception
    if code == 1:
        assert result.exception is error
    else:
        assert result.stderr.startswith(line)
        assert len(result.stderr.splitlines()) == 1
