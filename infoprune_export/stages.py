"""The stages of a run: each reads upstream folders, calls one room, and writes one folder.

data -> baseline
data -> gates -> heads -> ffn -> checkpoint -> accuracy -> onnx -> engine -> validation -> report
`----> bench -------'
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.artifacts import canonical_json, fingerprint
from infoprune_export.pipeline import Run, Stage, execute
from infoprune_export.recipe import Recipe, variant_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from infoprune_export.ffn.plan import FfnPlan
    from infoprune_export.heads.plan import HeadPlan
    from infoprune_export.models.vlm import VLM

PLAN, PLAN_WEIGHTS = "plan.json", "weights.safetensors"


# ── Shared by stages ─────────────────────────────────────────────────────────


def check_everything(run: Run) -> None:
    """Refuse, before anything is written, what would fail later: model, data, target, backend, device.

    Raises:
        InfopruneError: the first thing that is wrong.
    """
    from infoprune_export.data import dataset
    from infoprune_export.engine import backend_of
    from infoprune_export.models.vlm import check_model

    check_model(run.recipe.model)
    dataset.check(run.recipe.data)
    backend_of(run.target)
    _ = run.device


def writable_copy(vlm: VLM) -> VLM:
    """A VLM whose tower can be operated on; every weight outside the tower's blocks is shared with the original."""
    from infoprune_export.models import tower_of
    from infoprune_export.models.vlm import VLM

    own = {id(p) for block in vlm.tower.blocks for p in block.module.parameters()}
    shared = {id(p): p for p in vlm.model.parameters() if id(p) not in own}
    model = copy.deepcopy(vlm.model, memo=dict(shared))
    return VLM(model, vlm.processor, tower_of(model))


def read_plans(run: Run) -> tuple[HeadPlan, dict[str, Tensor], FfnPlan, dict[str, Tensor]]:
    """Both plans with their weights."""
    from safetensors.torch import load_file

    from infoprune_export.ffn.plan import FfnPlan
    from infoprune_export.heads.plan import HeadPlan

    heads, ffn = run.folder_of("heads"), run.folder_of("ffn")
    return (
        HeadPlan.from_dict(json.loads((heads / PLAN).read_text(encoding="utf-8"))),
        load_file(heads / PLAN_WEIGHTS),
        FfnPlan.from_dict(json.loads((ffn / PLAN).read_text(encoding="utf-8"))),
        load_file(ffn / PLAN_WEIGHTS),
    )


def open_checkpoint(run: Run, device: str | torch.device = "cpu") -> VLM:
    """The rewritten model, loaded as any user would load it."""
    from infoprune_export.models.vlm import load
    from infoprune_export.recipe import ModelSpec

    return load(ModelSpec(name_or_path=str(run.folder_of("checkpoint").resolve())), device)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_plan(folder: Path, plan: HeadPlan | FfnPlan, weights: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    (folder / PLAN).write_text(canonical_json(plan.to_dict()), encoding="utf-8")
    save_file({name: value.contiguous().cpu() for name, value in weights.items()}, folder / PLAN_WEIGHTS)


# ── Data and baseline ────────────────────────────────────────────────────────


def _make_data(run: Run, folder: Path) -> None:
    """Draw scenes, or record which of the user's files are used and what is in them."""
    from infoprune_export.data import dataset

    if run.recipe.data.images is None:
        dataset.draw_scenes(folder, run.recipe.data, run.recipe.seed)
    else:
        (folder / "files.json").write_text(canonical_json(_data_fingerprint(run.recipe)), encoding="utf-8")


def _data_fingerprint(recipe: Recipe) -> dict[str, Any]:
    from infoprune_export.data import dataset

    spec = recipe.data
    split = dataset.read(spec)
    files = {
        str(sample.image): fingerprint(sample.image)[sample.image.name]
        for sample in split.calibration + split.validation
    }
    for path in (spec.questions, spec.annotations):
        if path is not None:
            files[path] = fingerprint(Path(path))[Path(path).name]
    return files


def _data_slice(recipe: Recipe) -> dict[str, Any]:
    section = recipe.to_dict()["data"]
    if recipe.data.images is None:
        return {"data": section, "seed": recipe.seed}
    return {"data": section, "files": _data_fingerprint(recipe)}


def _make_baseline(run: Run, folder: Path) -> None:
    """The original model's answers."""
    from infoprune_export.validate.accuracy import collect_answers

    vlm, samples = run.original, run.split.validation
    advance = run.track("original model answers", len(samples))
    answers = collect_answers(vlm, samples, vlm.tower.features, on_batch=advance)
    (folder / "answers.json").write_text(canonical_json(answers), encoding="utf-8")


# ── Compression ──────────────────────────────────────────────────────────────


def _make_gates(run: Run, folder: Path) -> None:
    """Train the gates; everything about them but the choice of heads."""
    from safetensors.torch import save_file

    from infoprune_export.heads.train import discard_state, train_gates
    from infoprune_export.models.calibration import TaskLoss

    spec = run.recipe.heads
    if spec.method == "none":
        (folder / "history.json").write_text(canonical_json([]), encoding="utf-8")
        return
    loss = TaskLoss(run.split.labelled, run.original.tower, spec.questions_per_image)
    advance = run.track("gate epochs", spec.epochs)
    zeta, history = train_gates(
        run.original,
        run.split.calibration,
        spec,
        loss,
        seed=run.recipe.seed,
        scratch=folder,
        on_epoch=lambda epoch, terms: advance(1),
    )
    discard_state(folder)
    save_file({"zeta": zeta}, folder / "gates.safetensors")
    (folder / "history.json").write_text(canonical_json(history), encoding="utf-8")


def _make_heads(run: Run, folder: Path) -> None:
    """Choose heads and refit the output projections."""
    from safetensors.torch import load_file

    from infoprune_export.heads.plan import HeadPlan
    from infoprune_export.heads.refit import refit_heads
    from infoprune_export.heads.train import plan_heads

    spec = run.recipe.heads
    weights: dict[str, Tensor] = {}
    if spec.method == "none":
        plan = HeadPlan.full(run.original.tower.head_counts())
    else:
        plan = plan_heads(load_file(run.folder_of("gates") / "gates.safetensors")["zeta"], spec)
        if spec.method == "budgeted" and run.recipe.refit.enabled:
            pruned = writable_copy(run.original)
            weights = refit_heads(run.original, pruned, plan, run.split.calibration, run.recipe.refit.ridge)
    _write_plan(folder, plan, weights)


def _make_ffn(run: Run, folder: Path) -> None:
    """Choose and fit what replaces the FFNs, on top of the pruned heads."""
    from safetensors.torch import load_file

    from infoprune_export.ffn.obs import compress_obs
    from infoprune_export.ffn.plan import FfnPlan
    from infoprune_export.ffn.svd import compress_paper
    from infoprune_export.heads.plan import HeadPlan
    from infoprune_export.models.calibration import TaskLoss
    from infoprune_export.rewrite.surgery import apply_heads

    spec = run.recipe.ffn
    weights: dict[str, Tensor] = {}
    blocks = run.original.tower.blocks
    if spec.method == "none":
        plan = FfnPlan.full([block.ffn_shape.size for block in blocks])
    elif spec.method == "paper":
        plan, weights = compress_paper(run.original.tower, spec.epsilon)
    else:
        heads = run.folder_of("heads")
        pruned = writable_copy(run.original)
        apply_heads(pruned.tower, HeadPlan.from_dict(read_json(heads / PLAN)), load_file(heads / PLAN_WEIGHTS))
        advance = run.track("FFN blocks", 2 * len(blocks))
        plan, weights = compress_obs(
            run.original,
            pruned,
            run.split.calibration,
            TaskLoss(run.split.labelled, run.original.tower),
            spec,
            ridge=run.recipe.refit.ridge if run.recipe.refit.enabled else None,
            seed=run.recipe.seed,
            on_block=lambda block: advance(1),
        )
    _write_plan(folder, plan, weights)


def _make_checkpoint(run: Run, folder: Path) -> None:
    """Carry both plans out and save an ordinary checkpoint."""
    from infoprune_export.rewrite import checkpoint
    from infoprune_export.rewrite.surgery import apply_ffn, apply_heads

    vlm = writable_copy(run.original)
    heads, head_weights, ffn, ffn_weights = read_plans(run)
    apply_heads(vlm.tower, heads, head_weights)
    apply_ffn(vlm.tower, ffn, ffn_weights)
    checkpoint.save(vlm.model, vlm.processor, vlm.tower, folder)


# ── Accuracy in PyTorch ──────────────────────────────────────────────────────


def _make_accuracy(run: Run, folder: Path) -> None:
    """Answers after each compression step, still in PyTorch."""
    from infoprune_export.rewrite.surgery import apply_heads
    from infoprune_export.validate.accuracy import collect_answers

    samples = run.split.validation
    heads, head_weights, _, _ = read_plans(run)
    only_heads = writable_copy(run.original)
    apply_heads(only_heads.tower, heads, head_weights)
    pruned = open_checkpoint(run, run.device)
    advance = run.track("compressed model answers", 3 * len(samples))
    answers = {
        "heads": collect_answers(only_heads, samples, only_heads.tower.features, on_batch=advance),
        "ffn": collect_answers(pruned, samples, pruned.tower.features, on_batch=advance),
        "tokens": collect_answers(pruned, samples, _selecting(run, pruned), on_batch=advance),
    }
    (folder / "answers.json").write_text(canonical_json(answers), encoding="utf-8")


def _selecting(run: Run, vlm: VLM) -> Any:
    from infoprune_export.export.onnx import VisionEncoder

    encoder = VisionEncoder(vlm.tower, run.recipe.tokens)

    def encode(inputs: dict[str, Tensor]) -> Tensor:
        features = encoder(**inputs)
        return features[0] if isinstance(features, tuple) else features

    return encode


# ── Export and engine ────────────────────────────────────────────────────────


def _make_onnx(run: Run, folder: Path) -> None:
    """The compressed encoder with selection, the original without, and golden inputs and outputs."""
    from safetensors.numpy import save_file

    from infoprune_export.export.onnx import export_onnx, golden_io

    compressed, original = open_checkpoint(run), _on_cpu(run)
    tokens = run.recipe.tokens
    for name, vlm, selection in (("compressed", compressed, tokens), ("original", original, None)):
        (folder / name).mkdir()
        export_onnx(vlm.tower, selection, folder / name, opset=run.recipe.export.opset)
    save_file(golden_io(compressed.tower, tokens, batch_size=2, seed=run.recipe.seed), folder / "golden.safetensors")


def _on_cpu(run: Run) -> VLM:
    from infoprune_export.models.vlm import load

    return run.original if run.device == "cpu" else load(run.recipe.model)


def _make_engine(run: Run, folder: Path) -> None:
    """Build for the target and run it once on the golden inputs."""
    from safetensors.numpy import load_file

    from infoprune_export.engine import backend_of
    from infoprune_export.export.onnx import MODEL

    source = run.folder_of("onnx")
    engine = backend_of(run.target).build(source / "compressed" / MODEL, folder, run.target)
    engine.run(pixel_values=load_file(source / "golden.safetensors")["pixel_values"])


# ── Validation, bench, report ────────────────────────────────────────────────


def _make_validation(run: Run, folder: Path) -> None:
    from infoprune_export.validate.verdict import validate

    (folder / "validation.json").write_text(canonical_json(validate(run_inputs(run))), encoding="utf-8")


def run_inputs(run: Run) -> Any:
    """Everything validation compares, loaded."""
    from infoprune_export.engine import open_engine
    from infoprune_export.engine.onnxruntime import OnnxRuntimeEngine, open_session
    from infoprune_export.export.onnx import MODEL
    from infoprune_export.recipe import Target
    from infoprune_export.validate.verdict import Subject

    heads, head_weights, ffn, ffn_weights = read_plans(run)
    # The exported file is judged on the portable provider, the engine on its own.
    portable = Target(
        name="onnx",
        description="the exported file",
        backend="onnxruntime",
        providers=("CPUExecutionProvider",),
        threads=0,
    )
    return Subject(
        recipe=run.recipe,
        split=run.split,
        original=run.original if run.device == "cpu" else _on_cpu(run),
        pruned=open_checkpoint(run),
        full_copy=writable_copy(_on_cpu(run)),
        heads=heads,
        ffn=ffn,
        weights={**head_weights, **ffn_weights},
        onnx=OnnxRuntimeEngine(open_session(run.folder_of("onnx") / "compressed" / MODEL, portable), {}),
        engine=open_engine(run.folder_of("engine"), run.target),
        baseline=read_json(run.folder_of("baseline") / "answers.json"),
        answers=read_json(run.folder_of("accuracy") / "answers.json"),
        track=run.track,
    )


def _make_bench(run: Run, folder: Path) -> None:
    """Latency of the original and the compressed encoder; wall-clock figures, different at every measurement."""
    from infoprune_export.validate.bench import bench_onnx

    source = run.folder_of("onnx")
    advance = run.track(
        "bench rounds", len(run.recipe.bench.batch_sizes) * (run.recipe.bench.rounds + run.recipe.bench.warmup)
    )
    result = bench_onnx(
        source,
        open_checkpoint(run).tower,
        _on_cpu(run).tower,
        run.recipe.tokens,
        run.target,
        run.recipe.bench,
        on_round=lambda _: advance(1),
    )
    (folder / "bench.json").write_text(canonical_json(result), encoding="utf-8")


def _make_variants(run: Run, folder: Path) -> None:
    """Run every variant up to its accuracy, in a folder of its own beside this run's stages."""
    from infoprune_export.validate.verdict import summarize_variant

    results = {}
    for name in run.recipe.variants:
        recipe = variant_of(run.recipe, name)
        run.progress.console.print(f"[bold]variant {name}[/bold]")
        child = Run(recipe, run.folder / "variants-runs" / name, run.progress, donor=run.folder)
        execute(child, STAGES, "accuracy")
        results[name] = summarize_variant(
            recipe,
            child.split,
            read_plans(child),
            read_json(child.folder_of("baseline") / "answers.json"),
            read_json(child.folder_of("accuracy") / "answers.json"),
        )
    (folder / "variants.json").write_text(canonical_json(results), encoding="utf-8")


def _make_report(run: Run, folder: Path) -> None:
    from infoprune_export.validate.report import REPORT, pictures_of, render

    validation = read_json(run.folder_of("validation") / "validation.json")
    page = render(
        name=run.recipe.name,
        description=run.recipe.description,
        recipe=run.recipe.to_dict(),
        validation=validation,
        bench=read_json(run.folder_of("bench") / "bench.json"),
        variants=read_json(run.folder_of("variants") / "variants.json"),
        history=read_json(run.folder_of("gates") / "history.json"),
        pictures=pictures_of(run.original, validation),
    )
    (folder / REPORT).write_text(page, encoding="utf-8")


# ── Table ────────────────────────────────────────────────────────────────────


def _sections(*names: str) -> Any:
    def pick(recipe: Recipe) -> dict[str, Any]:
        tree = recipe.to_dict()
        return {name: tree[name] for name in names}

    return pick


def _gates_slice(recipe: Recipe) -> dict[str, Any]:
    heads = recipe.to_dict()["heads"]
    # Training does not look at how many heads go afterwards.
    return {"heads": {k: v for k, v in heads.items() if k not in ("remove", "threshold")}, "seed": recipe.seed}


def _target_slice(recipe: Recipe) -> dict[str, Any]:
    from infoprune_export.recipe import load_target

    return {"target": load_target(recipe.engine.target).model_dump(mode="json")}


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("data", "calibration and validation data", (), _data_slice, _make_data, uses_model=False),
        Stage("baseline", "answers of the original", ("data",), _sections(), _make_baseline),
        Stage("gates", "head gates trained", ("data",), _gates_slice, _make_gates, resumable=True),
        Stage("heads", "heads chosen and refitted", ("data", "gates"), _sections("heads", "refit"), _make_heads),
        Stage("ffn", "FFNs compressed", ("data", "heads"), _sections("ffn", "refit", "seed"), _make_ffn),
        Stage("checkpoint", "model rewritten", ("heads", "ffn"), _sections(), _make_checkpoint),
        Stage(
            "accuracy",
            "answers of the compressed",
            ("data", "baseline", "heads", "ffn", "checkpoint"),
            _sections("tokens"),
            _make_accuracy,
        ),
        Stage("onnx", "ONNX exported", ("checkpoint",), _sections("tokens", "export", "seed"), _make_onnx),
        Stage("engine", "engine built", ("onnx",), _target_slice, _make_engine),
        Stage(
            "validation",
            "validated",
            ("data", "baseline", "heads", "ffn", "checkpoint", "accuracy", "onnx", "engine"),
            _sections("validate", "tokens", "seed"),
            _make_validation,
        ),
        Stage("bench", "latency measured", ("onnx", "checkpoint"), _sections("bench", "engine"), _make_bench),
        Stage(
            "variants",
            "variants run",
            ("data", "baseline", "gates"),
            lambda recipe: {k: v for k, v in recipe.to_dict().items() if k not in ("validate", "bench", "description")},
            _make_variants,
        ),
        Stage(
            "report",
            "report written",
            ("gates", "validation", "bench", "variants"),
            _sections("description", "name"),
            _make_report,
        ),
    )
}
