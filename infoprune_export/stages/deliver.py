"""Stages from the ONNX file to the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.artifacts import canonical_json
from infoprune_export.pipeline import Run, execute
from infoprune_export.recipe import OnnxRuntimeTarget, Recipe, Target, TensorRtTarget, engine_target, variant_of
from infoprune_export.stages.budget import ALLOCATION
from infoprune_export.stages.common import open_checkpoint, portable_files, read_decoder, read_json, read_plans
from infoprune_export.stages.recovery import HISTORY, compressed_tower, read_recovery

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from infoprune_export.engine.tensorrt.profiles import Profile
    from infoprune_export.export.quantize import Scheme
    from infoprune_export.models.tower import Form

GOLDEN = "golden.safetensors"
SERVING = "serving"
"""Folder in an engine's, for servers."""
SERVED = "vision_encoder"
"""What servers call it. Not after the recipe: runs of several names may share one engine."""
SCORES = "scores.json"

# ── Export and engine ────────────────────────────────────────────────────────


def make_onnx(run: Run, folder: Path) -> None:
    """The compressed encoder with selection, the original without, and golden inputs and outputs.

    Beside a typed or INT8 encoder stays its fp32 graph, ``float``, so that what exporting and what rounding changed can
    be told apart.
    """
    from safetensors.numpy import save_file

    from infoprune_export.export.onnx import export_onnx, golden_io
    from infoprune_export.models.vlm import cast
    from infoprune_export.tokens.encoder import form_of

    tokens, spec = run.recipe.tokens, run.recipe.export
    original, compressed = run.original_on_cpu, open_checkpoint(run)
    form = form_of(original.tower, tokens, spec.several)
    for name, vlm, selection in (("original", original, None), ("compressed", compressed, tokens)):
        (folder / name).mkdir()
        tower = cast(vlm, spec.dtype, spec.keep_fp32 if name == "compressed" else ()).tower
        export_onnx(tower, selection, folder / name, opset=spec.opset, several=form.several)
    if spec.quantization == "int8":
        (folder / "compressed").rename(folder / "float")
        (folder / "compressed").mkdir()
        from infoprune_export.export.quantize import quantize_int8

        feeds = _calibration_feeds(run, form)
        quantize_int8(folder / "float", folder / "compressed", feeds, scheme=int8_scheme(run.recipe))
    elif spec.precision != "fp32":
        (folder / "float").mkdir()
        export_onnx(compressed.tower, tokens, folder / "float", opset=spec.opset, several=form.several)
    golden = golden_io(compressed.tower, tokens, images=2, seed=run.recipe.seed, several=form.several)
    save_file(golden, folder / GOLDEN)


def int8_scheme(recipe: Recipe) -> Scheme:
    """How INT8 activations are quantized for the recipe's target."""
    if recipe.export.int8_scheme != "auto":
        return recipe.export.int8_scheme
    return "tensorrt" if isinstance(engine_target(recipe.engine), TensorRtTarget) else "cpu"


def _calibration_feeds(run: Run, form: Form) -> Iterator[dict[str, NDArray[Any]]]:
    """The calibration images as ONNX inputs, one call after another."""
    from infoprune_export.models.calibration import inputs_of

    vlm = run.original_on_cpu
    advance = run.track("INT8 calibration images", len(run.split.calibration))
    for sample in run.split.calibration:
        for planned in vlm.tower.calls(inputs_of(vlm, [sample]), form):
            yield {name: value.numpy() for name, value in planned.items()}
        advance(1)


def make_engine(run: Run, folder: Path) -> None:
    """Build for the target and run it once on the golden inputs, if it is built for so many and such images."""
    from safetensors.numpy import load_file

    from infoprune_export.engine import backend_of
    from infoprune_export.export.onnx import MODEL

    source, target = run.folder_of("onnx"), engine_target(run.recipe.engine)
    profile = _profile(run) if isinstance(target, TensorRtTarget) else None
    engine = backend_of(target).build(
        source / "compressed" / MODEL, folder, target, profile=profile, progress=run.progress
    )
    _write_serving(run, folder, source / "compressed" / MODEL, target, profile)
    golden = load_file(source / GOLDEN)
    inputs = {name: golden[name].astype(dtype) for name, dtype in engine.input_types().items()}
    if problem := engine.covers({name: value.shape for name, value in inputs.items()}):
        run.progress.console.print(f"not run on the golden inputs: {problem}", markup=False, style="yellow")
        return
    engine.run(**inputs)


def _write_serving(run: Run, folder: Path, model: Path, target: Target, profile: Profile | None) -> None:
    """A Triton model repository with the engine in it, and DeepStream's configuration where it can feed the encoder."""
    from infoprune_export.engine import onnxruntime, serving
    from infoprune_export.engine.tensorrt.build import PLAN, PLUGIN

    inputs, outputs = serving.tensors_of(model)
    served = serving.Serving(
        SERVED,
        inputs,
        outputs,
        gpu=not isinstance(target, OnnxRuntimeTarget) or target.providers[0] != "CPUExecutionProvider",
        plugin=(folder / PLUGIN).is_file(),
        normalisation=serving.normalisation_of(run.original_on_cpu.processor),
    )
    if profile is None:
        serving.write_serving(folder / SERVING, served, "onnxruntime_onnx", folder / onnxruntime.ENGINE)
    else:
        served = replace(served, batches=serving.batches_of(profile, inputs))
        serving.write_serving(folder / SERVING, served, "tensorrt_plan", folder / PLAN)


def _profile(run: Run) -> Profile:
    """Shapes of the recipe's engine section; structure does not change them."""
    from infoprune_export.engine.tensorrt.profiles import profile_of
    from infoprune_export.tokens.encoder import form_of

    tower = run.original_on_cpu.tower
    form = form_of(tower, run.recipe.tokens, run.recipe.export.several)
    return profile_of(tower, form, run.recipe.engine)


# ── Validation, bench, report ────────────────────────────────────────────────


def make_validation(run: Run, folder: Path) -> None:
    """Parity, accuracy and the verdict, and the score of every question."""
    from infoprune_export.validate.verdict import validate

    result, scores = validate(_subject(run))
    (folder / "validation.json").write_text(canonical_json(result), encoding="utf-8")
    # One line: there are thousands of numbers.
    (folder / SCORES).write_text(json.dumps(scores, sort_keys=True) + "\n", encoding="utf-8")


def _subject(run: Run) -> Any:
    """Everything validation compares, loaded."""
    from infoprune_export.engine import open_engine
    from infoprune_export.engine.onnxruntime import open_portable
    from infoprune_export.export.onnx import MODEL
    from infoprune_export.models.vlm import writable_copy
    from infoprune_export.validate.verdict import Subject

    heads, head_weights, ffn, ffn_weights = read_plans(run)
    # The exported files are judged on the portable provider, the engine on its own.
    files = portable_files(run.recipe)
    made = {step: open_portable(run.folder_of("onnx") / name / MODEL) for step, name in files.items()}
    return Subject(
        recipe=run.recipe,
        split=run.split,
        answering=run.original if run.recipe.language.method == "none" else open_checkpoint(run, run.device),
        original=run.original_on_cpu,
        pruned=open_checkpoint(run),
        full_copy=writable_copy(run.original_on_cpu),
        by_plans=compressed_tower(run, recovered=False, on_cpu=True),
        recovery=read_recovery(run),
        heads=heads,
        ffn=ffn,
        weights={**head_weights, **ffn_weights},
        engines={**made, "engine": open_engine(run.folder_of("engine"), run.target)},
        baseline=read_json(run.folder_of("baseline") / "answers.json"),
        answers=read_json(run.folder_of("accuracy") / "answers.json"),
        decoder=read_decoder(run, run.original),
        track=run.track,
    )


def make_bench(run: Run, folder: Path) -> None:
    """Latency of the original and the compressed encoder; wall-clock figures, different at every measurement."""
    from infoprune_export.validate.bench import bench
    from infoprune_export.validate.bench_case import case_of_run

    arguments = (run.recipe, run.folder_of("onnx"), run.folder_of("checkpoint"))
    case = case_of_run(*arguments, original=run.original_on_cpu.tower)
    result = bench(case_of_run, arguments, run.track, case)
    (folder / "bench.json").write_text(canonical_json(result), encoding="utf-8")


def make_variants(run: Run, folder: Path) -> None:
    """Run every variant up to its accuracy, in a folder of its own beside this run's stages.

    What equals a stage of this run, or of a variant before, is not done again.
    """
    from infoprune_export.stages import STAGES
    from infoprune_export.validate.verdict import summarize_variant

    results = {}
    donors: tuple[Path, ...] = (run.folder,)
    for name in run.recipe.variants:
        recipe = variant_of(run.recipe, name)
        run.progress.console.print(f"[bold]variant {name}[/bold]")
        child = Run(recipe, run.folder / "variants-runs" / name, run.progress, donors=donors)
        execute(child, STAGES, "accuracy")
        donors = (*donors, child.folder)
        results[name] = summarize_variant(
            recipe,
            child.split,
            read_plans(child),
            read_json(child.folder_of("baseline") / "answers.json"),
            read_json(child.folder_of("accuracy") / "answers.json"),
        )
    (folder / "variants.json").write_text(canonical_json(results), encoding="utf-8")


def make_report(run: Run, folder: Path) -> None:
    """The HTML page, and the same for machines."""
    from infoprune_export.validate import report_json
    from infoprune_export.validate.report import REPORT, pictures_of, render

    validation = read_json(run.folder_of("validation") / "validation.json")
    variants = read_json(run.folder_of("variants") / "variants.json")
    attributed = run.finished.get("attribution")
    report = report_json.build(
        name=run.recipe.name,
        description=run.recipe.description,
        recipe=run.recipe.to_dict(),
        validation=validation,
        bench=read_json(run.folder_of("bench") / "bench.json"),
        variants=variants,
        artefacts=report_json.describe(run.finished),
        attribution=read_json(attributed / "attribution.json") if attributed is not None else None,
    )
    page = render(
        report,
        validation=validation,
        budget=read_json(run.folder_of("budget") / ALLOCATION),
        variants=variants,
        history=read_json(run.folder_of("gates") / "history.json"),
        recovery=read_json(run.folder_of("recovery") / HISTORY),
        pictures=pictures_of(run.original, run.split.validation, validation),
    )
    report_json.write(folder / report_json.REPORT_JSON, report)
    (folder / REPORT).write_text(page, encoding="utf-8")
