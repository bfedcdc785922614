"""``optimum-cli export infoprune``: the vision encoder of a model folder as ONNX, without a recipe and a run folder.

For whoever lives in optimum already. The encoder is exported as it is in the checkpoint, original or pruned; pruning
itself takes calibration images and a recipe, which is what ``infoprune-export`` is for. As optimum's own exporters do,
the command ends by comparing ONNX Runtime with PyTorch on dummy inputs. optimum finds it by
``optimum/commands/register``, and imports it on every ``optimum-cli`` call: nothing heavy is imported before `run`.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from infoprune_export.errors import InfopruneError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from infoprune_export.models.vlm import VLM
    from infoprune_export.recipe import ExportSpec, TokensSpec
    from infoprune_export.validate.parity import Parity

_BF16_OPSET = 22


class ExportInfopruneCommand(BaseOptimumCLICommand):
    """Parses, calls `export`, prints one line."""

    COMMAND = CommandInfo(
        name="infoprune", help="Export the vision encoder of a vision-language model to ONNX (infoprune-export)."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = (
            "Export the vision encoder of a vision-language model, with its projector and optionally with visual-token "
            "selection, as one ONNX graph, and compare it with PyTorch. Exit codes: 0 done, 1 ONNX Runtime and "
            "PyTorch differ by more than the tolerance, 2 a mistake in the input or the environment."
        )
        parser.add_argument(
            "-m", "--model", required=True, metavar="NAME_OR_PATH", help="Folder with config.json, or hub id."
        )
        parser.add_argument("output", type=Path, metavar="OUTPUT", help="Folder to make; must not hold anything yet.")
        parser.add_argument("--opset", type=int, help="ONNX opset, 18 to 22. [default: 20; bf16: 22]")
        parser.add_argument(
            "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="Type of weights and activations."
        )
        parser.add_argument(
            "--images",
            choices=("auto", "one", "several"),
            default="auto",
            help="Images per call where their sizes may differ (Qwen, LLaVA-NeXT). [auto: one with --keep-ratio]",
        )
        parser.add_argument(
            "--keep-ratio",
            metavar="RATIO",
            help="Keep this part of the visual tokens, for example 0.5 or 64/576. [default: no selection]",
        )
        parser.add_argument(
            "--tolerance",
            type=float,
            help="Largest difference from PyTorch, relative to the largest output. [default: by dtype]",
        )

    def run(self) -> None:
        arguments = self.args
        given = {"precision": arguments.dtype, "images": arguments.images, "opset": arguments.opset}
        try:
            message, passed = export(
                arguments.model, arguments.output, given, arguments.keep_ratio, arguments.tolerance
            )
        except InfopruneError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted; nothing was written", err=True)
            sys.exit(130)
        click.echo(message, err=not passed)
        if not passed:
            sys.exit(1)


def export(
    name_or_path: str, output: Path, given: dict[str, object], keep_ratio: str | None, tolerance: float | None
) -> tuple[str, bool]:
    """Write the graph, the configuration and the processor to `output`, or nothing.

    Returns:
        One line that says what was written, and whether PyTorch and ONNX Runtime agree; if not, nothing was.

    Raises:
        InfopruneError: the arguments, the model, the folder or the environment do not allow it.
    """
    spec, tokens = _check_arguments(given, keep_ratio, tolerance)
    output = _check_output(output)
    from infoprune_export.console import quiet_libraries

    quiet_libraries()
    from infoprune_export.artifacts import staged
    from infoprune_export.engine import backend_of
    from infoprune_export.export.onnx import export_onnx
    from infoprune_export.models.vlm import check_model, load
    from infoprune_export.recipe import ModelSpec, load_target

    compared = spec.precision != "bf16"
    if compared:
        backend_of(load_target("onnxruntime-cpu"))
    model = ModelSpec(name_or_path=name_or_path)
    check_model(model)
    vlm = load(model, dtype=spec.dtype)
    try:
        with staged(output) as folder:
            form = export_onnx(vlm.tower, tokens, folder, opset=spec.opset, several=spec.several)
            vlm.model.config.save_pretrained(folder)
            vlm.processor.save_pretrained(folder)
            parities = list(_compare(vlm, spec, tokens, folder, tolerance)) if compared else []
            if failed := [parity for parity in parities if not parity.passed]:
                raise _DiffersError(failed[0])
    except _DiffersError as error:
        return f"FAIL: {error}; {output} was not written", False
    selection = f"{tokens.keep_ratio} of the visual tokens" if form.selecting else "all visual tokens"
    images = "several images" if form.several else "one image"
    if parities:
        worst = max(parities, key=lambda parity: parity.relative_error)
        verdict = f"ONNX Runtime within {worst.relative_error:.1e} of PyTorch (allowed {worst.tolerance:.0e})"
    else:
        verdict = "not compared with PyTorch: ONNX Runtime does not run bf16 on a CPU"
    return f"{output}: {spec.precision}, opset {spec.opset}, {images} a call, {selection}; {verdict}", True


class _DiffersError(Exception):
    """ONNX Runtime and PyTorch do not agree; leaves `staged`, which then removes what was written."""

    def __init__(self, parity: Parity) -> None:
        kept = parity.kept_suboptimality
        selection = "" if kept is None else f", kept tokens by {kept:.1e} (allowed {parity.replay_tolerance:.0e})"
        super().__init__(
            f"on {parity.case}, ONNX Runtime and PyTorch differ by {parity.relative_error:.1e} of the largest output "
            f"(allowed {parity.tolerance:.0e}), cosine {parity.cosine:.6f} (at least {parity.min_cosine}){selection}"
        )


# ── Arguments ────────────────────────────────────────────────────────────────


def _check_arguments(
    given: dict[str, object], keep_ratio: str | None, tolerance: float | None
) -> tuple[ExportSpec, TokensSpec]:
    """The recipe sections that the arguments stand for, so that limits and defaults are the recipe's."""
    import pydantic

    from infoprune_export.recipe import ExportSpec, TokensSpec

    selection = {"method": "none"} if keep_ratio is None else {"keep_ratio": keep_ratio}
    given = {key: value for key, value in given.items() if value is not None}
    if given["precision"] == "bf16":
        given.setdefault("opset", _BF16_OPSET)
    try:
        spec = ExportSpec.model_validate(given)
        tokens = TokensSpec.model_validate(selection)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        option = "--" + str(problem["loc"][0]).replace("_", "-")
        raise InfopruneError(
            f"{option} {problem['input']!r:.60}: {problem['msg'].removeprefix('Value error, ')}"
        ) from None
    if spec.precision == "bf16" and spec.opset < _BF16_OPSET:
        raise InfopruneError(
            f"--opset {spec.opset}: ONNX has no bf16 convolution before opset {_BF16_OPSET}; leave --opset out"
        )
    if tolerance is not None and not 0 < tolerance < 1:
        raise InfopruneError(f"--tolerance {tolerance}: relative to the largest output; give a number between 0 and 1")
    return spec, tokens


def _check_output(output: Path) -> Path:
    """The folder by its full name. What is there already is not ours to replace."""
    folder = output.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or folder == Path.cwd() or any(folder.iterdir())):
        raise InfopruneError(f"{output}: there is something here already; give a folder that does not exist yet")
    return folder


# ── Comparison ───────────────────────────────────────────────────────────────


def _compare(vlm: VLM, spec: ExportSpec, tokens: TokensSpec, folder: Path, tolerance: float | None) -> Iterator[Parity]:
    """ONNX Runtime on the written file against PyTorch, which computes in fp32 with the exported weights."""
    from infoprune_export.engine.onnxruntime import OnnxRuntimeEngine, open_session
    from infoprune_export.export.onnx import MODEL
    from infoprune_export.recipe import ValidateSpec, load_target
    from infoprune_export.validate.parity import LIMITS, encoder_parity

    engine = OnnxRuntimeEngine(open_session(folder / MODEL, load_target("onnxruntime-cpu")), {})
    default, min_cosine = LIMITS[spec.precision]
    vlm.model.float()
    for case, inputs in _dummy_inputs(vlm):
        yield encoder_parity(
            "onnx",
            vlm.tower,
            tokens,
            engine,
            inputs,
            case=case,
            tolerance=default if tolerance is None else tolerance,
            min_cosine=min_cosine,
            replay_tolerance=ValidateSpec().replay_tolerance if spec.precision == "fp32" else None,
            several=spec.several,
        )


def _dummy_inputs(vlm: VLM) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tower's own example of one and of three images, and optimum's dummy images where it has a generator.

    optimum's generator makes a batch of square images of uniform noise. Qwen's flat patches with grids and LLaVA-NeXT's
    tiles with sizes are not that; and on noise without structure every patch looks alike, so it is no replacement.
    """
    import torch
    from optimum.utils import DummyVisionInputGenerator, NormalizedVisionConfig

    for images in (1, 3):
        inputs = vlm.tower.example_inputs(images, torch.Generator().manual_seed(images))
        yield f"{images} example image(s)", inputs
    if inputs.keys() == {"pixel_values"}:
        config = NormalizedVisionConfig(vlm.model.config.vision_config)
        with torch.random.fork_rng(devices=[]):  # the generator draws from the global state
            torch.manual_seed(0)
            generator = DummyVisionInputGenerator("image-to-text", config, batch_size=2)
            yield "optimum's dummy images", {"pixel_values": generator.generate("pixel_values", framework="pt")}
