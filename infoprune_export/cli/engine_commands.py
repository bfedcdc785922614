"""Commands about engines for other machines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from infoprune_export.cli.group import bring_up_to, main, read, takes_json, write_json
from infoprune_export.errors import InfopruneError

if TYPE_CHECKING:
    from infoprune_export.engine.tensorrt.profiles import Profile
    from infoprune_export.recipe import TensorRtTarget


@main.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="NAME", help="TensorRT target of engines/targets, or a file.")
@click.option(
    "--profile",
    "shapes",
    type=click.Path(path_type=Path),
    help='JSON of the largest calls: {"INPUT": {"min": [...], "opt": [...], "max": [...]}}.',
)
@takes_json
def lint(path: Path, target: str, shapes: Path | None, file: Path | None) -> None:
    """List what a TensorRT release would refuse in an ONNX file, or run slowly; needs neither TensorRT nor a GPU.

    FILE is an ONNX file, or the folder of an export or a run. Ends with exit code 1 when there is an error.

    \b
    Example:
      infoprune-export lint runs/quickstart --target jetson-orin-jp62
    """
    from dataclasses import asdict

    chosen = _tensorrt_target(target)
    profile = None if shapes is None else _read_profile(shapes)
    model = _model_in(path)
    from infoprune_export.console import quiet_libraries, wide_console

    quiet_libraries()
    from infoprune_export.engine.tensorrt.lint import lint as examine
    from infoprune_export.engine.tensorrt.lint import table_of

    findings = examine(model, chosen, profile)
    errors = sum(finding.severity == "error" for finding in findings)
    if findings:
        wide_console().print(table_of(findings))
    click.echo(
        f"{chosen.name} (TensorRT {chosen.tensorrt}, TokenSelect as {chosen.token_select}): {errors} errors, "
        f"{len(findings) - errors} warnings; no engine was built"
    )
    if profile is None:
        click.echo("without --profile, no TopK was checked whose K follows the shapes")
    write_json(
        file,
        {
            "target": chosen.name,
            "token_select": chosen.token_select,
            "profile": None if profile is None else profile.to_dict(),
            "findings": [asdict(finding) for finding in findings],
        },
    )
    sys.exit(1 if errors else 0)


@main.command()
@click.argument("recipe")
@click.option("--target", metavar="NAME", help="TensorRT target of engines/targets, or a file; overrides the recipe.")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder of the kit.")
@click.option("--run", type=click.Path(path_type=Path), help="Folder of the run. [default: runs/NAME of the recipe]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key. Repeatable.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute; overrides the recipe.")
@click.option("--force", is_flag=True, help="Replace the kit's folder if it is there.")
def kit(
    recipe: str,
    target: str | None,
    output: Path,
    run: Path | None,
    overrides: tuple[str, ...],
    device: str | None,
    force: bool,
) -> None:
    """Write a kit that builds and proves a TensorRT engine on its target, without this package there.

    The target needs TensorRT, Python 3.8 and NumPy. Its report comes back to: validate --kit-report report.json

    \b
    Example:
      infoprune-export kit quickstart --target jetson-orin-jp62 -o kit --set export.precision=fp16
    """
    checked = read(recipe, overrides, device)
    chosen = _tensorrt_target(target or checked.engine.target)
    if checked.export.quantization == "int8":
        overrides = (*overrides, "export.int8_scheme=tensorrt")
        checked = read(recipe, overrides, device)
    from infoprune_export.artifacts import MANIFEST, make_folder, write_text
    from infoprune_export.engine.tensorrt.kit_folder import check_kit

    check_kit(chosen, output, force=force)
    folder = run or Path("runs") / checked.name
    exported = bring_up_to("onnx", recipe, overrides, folder, device, force=False)
    from infoprune_export.engine.tensorrt.kit import KitSource, make_kit
    from infoprune_export.export.onnx import MODEL
    from infoprune_export.pipeline import load_vlm
    from infoprune_export.recipe import ModelSpec
    from infoprune_export.validate.kit_report import KITS

    compressed = load_vlm(ModelSpec(name_or_path=str((folder / "checkpoint").resolve())), "cpu")
    make_kit(KitSource(checked, compressed, exported / "compressed" / MODEL, chosen), output, force=force)
    make_folder(folder / KITS)
    write_text(folder / KITS / f"{chosen.name}.json", (output / MANIFEST).read_text(encoding="utf-8"))
    click.echo(output)


# ── Helpers ──────────────────────────────────────────────────────────────────


def _tensorrt_target(name: str) -> TensorRtTarget:
    from infoprune_export.recipe import TensorRtTarget, assets, load_target

    target = load_target(name)
    if not isinstance(target, TensorRtTarget):
        others = [stem for stem in assets("targets") if not stem.startswith("onnxruntime")]
        raise InfopruneError(f"target {target.name}: is for {target.backend}, not TensorRT; use {', '.join(others)}")
    return target


def _model_in(path: Path) -> Path:
    """An ONNX file, given by itself or by the folder of an export or a run."""
    if not path.is_dir():
        return path
    for inside in ("model.onnx", "compressed/model.onnx", "onnx/compressed/model.onnx"):
        if (path / inside).is_file():
            return path / inside
    raise InfopruneError(f"{path}: no model.onnx here; give an ONNX file, or a run that reached its export")


def _read_profile(path: Path) -> Profile:
    from infoprune_export.engine.tensorrt.profiles import Profile

    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("expected one entry for each input")
        return Profile.from_dict(tree)
    except OSError as error:
        raise InfopruneError(f"--profile: {path}: cannot be read ({error.strerror}); give a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise InfopruneError(f"--profile: {path}: {str(error)[:160]}; see infoprune-export lint --help") from None
