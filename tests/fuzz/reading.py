"""What is fuzzed: every reader of a file, a text or a record that a user can write, with valid examples of its input.

A reader makes its surroundings (images, a second file) once in a folder and then takes one file's bytes at a time. It
does what a command does with what was read: a dataset is split, scored and summed up, a report is drawn.
"""

from __future__ import annotations

import io
import json
import runpy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

TESTS = Path(__file__).parent.parent
Read = Callable[[bytes], object]


@dataclass(frozen=True)
class Reader:
    """`prepare` writes into an empty folder and returns valid inputs and the function that reads one."""

    form: str
    """Of `mutating.MUTATORS`."""
    share: float
    """Of all inputs, relative to the other readers'; the slow ones get less."""
    prepare: Callable[[Path], tuple[Sequence[bytes], Read]]


def _file(path: Path, read: Callable[[], object]) -> Read:
    def on(data: bytes) -> object:
        path.write_bytes(data)
        return read()

    return on


# ── Datasets ─────────────────────────────────────────────────────────────────


def _dataset(name: str, file: str) -> Callable[[Path], tuple[Sequence[bytes], Read]]:
    """One of a format's files (as the tests of formats write them), the others being valid."""

    def prepare(folder: Path) -> tuple[Sequence[bytes], Read]:
        from infoprune_export.data import dataset
        from infoprune_export.data.formats import format_of

        writers = runpy.run_path(str(TESTS / "data" / "test_format_files.py"))["WRITERS"]
        spec = writers[name](folder)
        path = folder / file
        if file == "ocr.json":
            rows = json.loads((folder / "val.json").read_text())["data"]
            ocr = {"data": [{"image_id": row["image_id"], "ocr_tokens": ["DAKOTA", "7,5"]} for row in rows]}
            path.write_text(json.dumps(ocr))
            spec = spec.model_copy(update={"ocr_tokens": True, "annotations": str(path)})
        (folder / "outside.jpg").write_bytes(b"")

        def read() -> None:
            split = dataset.read(spec)
            questions = [question for sample in split.validation for question in sample.questions]
            known = format_of(name)
            for answers in ([q.answers[0] for q in questions], ["yes"] * len(questions)):
                scores = known.score(questions, answers)
                known.figures(questions, answers, scores)
                assert len(scores) == len(questions)
                assert all(0 <= score <= 1 for score in scores.tolist())
            for sample in split.validation:
                if not isinstance(sample.image, Path):
                    sample.image.read()
                else:
                    assert sample.image.resolve().is_relative_to(folder.resolve())

        return [path.read_bytes()], _file(path, read)

    return prepare


def _hub(folder: Path) -> tuple[Sequence[bytes], Read]:
    """Rows of any benchmark's release, as its parquet files hold them."""
    from infoprune_export.data import hub
    from infoprune_export.data.formats import FORMATS, format_of
    from infoprune_export.recipe import DataSpec

    rows_of = runpy.run_path(str(TESTS / "data" / "test_hub.py"))["rows_of"]
    examples, picture = {}, b""
    for name in FORMATS:
        rows = [row for n in range(2) for row in rows_of(name, n)]
        picture = next((row["image"]["bytes"] for row in rows if "image" in row), picture)
        examples[name] = json.dumps({"format": name, "rows": [{**row, "image": "picture"} for row in rows]}).encode()
    specs = {name: DataSpec(format=name, hub="x", calibration_images=1) for name in FORMATS}

    def read(data: bytes) -> None:
        try:
            tree = json.loads(data)
            spec, rows = specs[tree["format"]], tree["rows"]
            rows = [{**row, "image": {"bytes": picture}} if row["image"] == "picture" else row for row in rows]
            json.dumps(tree, ensure_ascii=False).encode()  # as parquet's texts are
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return  # no table
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            known = format_of(spec.format or "")
            pairs = list(hub._pairs(rows, {}, known.hub.convert, spec))
            samples = hub._enough(iter(pairs), spec, Path(scratch), lambda rows: None, scattered=known.hub.scattered)
            json.dumps(samples, ensure_ascii=False).encode()
            if questions := [question for _, _, question in pairs]:
                answers = [question.answers[0] for question in questions]
                known.figures(questions, answers, known.score(questions, answers))

    return list(examples.values()), read


def _image(folder: Path) -> tuple[Sequence[bytes], Read]:
    from infoprune_export.data.samples import open_image

    examples = []
    for form, options in (
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("BMP", {}),
    ):
        for mode in ("RGB", "L"):
            buffer = io.BytesIO()
            Image.new(mode, (9, 7), 77).save(buffer, form, **options)
            examples.append(buffer.getvalue())
    return examples, _file(folder / "image.png", lambda: open_image(folder / "image.png"))


# ── Recipes and targets ──────────────────────────────────────────────────────

_RECIPE = b"""\
name: small
model: {name_or_path: testbed/tiny-llava}
data: {calibration_images: 8, validation_questions: 16}
heads: {method: paper, remove: 0.25}
tokens: {method: infoprune, keep_ratio: "64/576"}
variants:
  none: {tokens.keep_ratio: 1}
grid: {heads.remove: [0.25, 0.5], seed: [1, 2]}
"""


def _recipe(folder: Path) -> tuple[Sequence[bytes], Read]:
    from infoprune_export.recipe import load_recipe

    small = b"name: a\nmodel:\n  name_or_path: x\nengine: {target: cpu}\nexport: {precision: fp32}\n"
    path = folder / "recipe.yaml"

    def read() -> None:
        recipe = load_recipe(path)
        json.dumps(recipe.to_dict(), allow_nan=False).encode()

    return [_RECIPE, small], _file(path, read)


def _recorded_recipe(folder: Path) -> tuple[Sequence[bytes], Read]:
    from infoprune_export.artifacts import canonical_json
    from infoprune_export.recipe import load_recipe, points_of, read_recipe, variant_of

    (folder / "recipe.yaml").write_bytes(_RECIPE)
    whole = load_recipe(folder / "recipe.yaml")
    path = folder / "recipe.json"

    def read() -> None:
        recipe = read_recipe(path)
        canonical_json(recipe.to_dict()).encode()
        for variant in recipe.variants:
            variant_of(recipe, variant)
        points_of(recipe)

    return [canonical_json(whole.to_dict()).encode()], _file(path, read)


def _setting(option: str) -> Callable[[Path], tuple[Sequence[bytes], Read]]:
    def prepare(folder: Path) -> tuple[Sequence[bytes], Read]:
        from infoprune_export.recipe import load_recipe

        path = folder / "recipe.yaml"
        path.write_bytes(b"name: small\nmodel: {name_or_path: testbed/tiny-llava}\n")
        examples = {
            "set": [b"heads.remove=0.25", b"bench={batch_sizes: [1], rounds: 3}", b'tokens.keep_ratio="64/576"'],
            "grid": [b"heads.remove=0.25,0.5", b"seed=1,2,3", b"tokens.method=none,infoprune"],
        }[option]

        def read(data: bytes) -> None:
            # As the operating system hands arguments over.
            text = data.replace(b"\0", b"").decode("utf-8", "surrogateescape")
            load_recipe(path, *(([text],) if option == "set" else ((), [text])))

        return examples, read

    return prepare


def _target(folder: Path) -> tuple[Sequence[bytes], Read]:
    from infoprune_export.recipe import assets, load_target

    examples = [path.read_bytes() for path in assets("targets").values()]
    path = folder / "target.yaml"
    return examples, _file(path, lambda: load_target(str(path)).model_dump(mode="json"))


# ── Manifests, reports and records ───────────────────────────────────────────


def _manifest(folder: Path) -> tuple[Sequence[bytes], Read]:
    from infoprune_export.artifacts import MANIFEST, read_manifest, verify, write_manifest

    (folder / "stage" / "part").mkdir(parents=True)
    (folder / "stage" / "weights.safetensors").write_bytes(b"weights")
    (folder / "stage" / "part" / "plan.json").write_text("{}")
    (folder / "outside").write_text("")
    write_manifest(folder / "stage", stage="heads", key="0" * 64, inputs={"model": {"a": "1"}}, recipe={"remove": 0.5})
    path = folder / "stage" / MANIFEST

    def read() -> None:
        found = read_manifest(folder / "stage")
        assert found is not None
        verify(folder / "stage", found)
        assert all((folder / "stage" / name).resolve().is_relative_to(folder / "stage") for name in found["outputs"])
        # What the pipeline and open_run look up.
        assert isinstance(found["key"], str)
        assert isinstance(found["inputs"].keys() & found["recipe"].keys(), set)

    return [path.read_bytes()], _file(path, read)


def _kit(mutated: str) -> Callable[[Path], tuple[Sequence[bytes], Read]]:
    """A kit's report beside a valid manifest, or its manifest with a report that belongs to it."""

    def prepare(folder: Path) -> tuple[Sequence[bytes], Read]:
        from rich.console import Console

        from infoprune_export.artifacts import canonical_json, sha256_file
        from infoprune_export.validate.kit_report import conclusion, read_report, render

        known = runpy.run_path(str(TESTS / "validate" / "test_kit_report.py"))
        manifest, report = folder / "manifest.json", folder / "report.json"
        manifest.write_text(canonical_json(known["MANIFEST"]))
        examples = []
        for verdict in ("PASS", "FAIL"):
            tree = {**known["REPORT"], "kit": sha256_file(manifest), "verdict": verdict}
            if verdict == "FAIL":
                tree |= {"attention": {"fused": 0, "expected": 3, "layers": 40}, "reasons": ["fused attention"]}
            examples.append(json.dumps(tree).encode())
        whole = json.loads(examples[0])

        def read(data: bytes) -> None:
            if mutated == "report":
                report.write_bytes(data)
            else:
                manifest.write_bytes(data)
                report.write_text(json.dumps({**whole, "kit": sha256_file(manifest)}))
            found = read_report(report)
            console = Console(file=io.StringIO(), width=100)
            console.print(*render(found))
            conclusion(found).encode()

        return examples if mutated == "report" else [manifest.read_bytes()], read

    return prepare


def _run_report(folder: Path) -> tuple[Sequence[bytes], Read]:
    """A run's report.json, which ``compare`` reads."""
    from infoprune_export.validate import report_json

    made_up = runpy.run_path(str(TESTS / "validate" / "report_inputs.py"))
    path = folder / "report.json"
    example = report_json.dumps(made_up["report_of"](made_up["page_inputs"]())).encode()
    return [example], _file(path, lambda: report_json.read(path))


def _checkpoint(folder: Path) -> tuple[Sequence[bytes], Read]:
    """The structure record of a pruned checkpoint, on a tower and a language model of the testbed's kind."""
    import torch

    from infoprune_export.data import testbed
    from infoprune_export.language.record import shape_language_like
    from infoprune_export.models import tower_of
    from infoprune_export.models.language import language_layers
    from infoprune_export.rewrite.checkpoint import InfopruneConfig, shape_like, structure_of

    def build() -> tuple[Any, Any]:
        with torch.device("meta"):
            model = testbed.build_model(layers=3, hidden_size=16, heads=2, seed=0)
        return tower_of(model), language_layers(model)

    tower, layers = build()
    layer = {"num_heads": layers[0].num_heads, "num_key_value_heads": layers[0].num_key_value_heads}
    layer |= {"head_dim": layers[0].head_dim, "neurons": layers[0].num_neurons}
    record = {
        "quant_method": "infoprune",
        "schema_version": 2,
        "blocks": structure_of(tower),
        "language": [layer] * len(layers),
    }
    examples = []
    for shape in (
        record["blocks"][0]["ffn"],
        {"kind": "linear", "size": 3},
        {"kind": "constant", "size": 0},
        {"kind": "factored", "size": 20, "ranks": [2, 3]},
        {"kind": "bypass", "size": 20, "ranks": [2]},
    ):
        blocks = [{**block, "num_heads": 1, "ffn": shape} for block in record["blocks"]]
        examples.append(json.dumps({**record, "blocks": blocks}).encode())
    made = [build()]
    whole, neurons = structure_of(made[0][0]), layers[0].num_neurons

    def read(data: bytes) -> None:
        tree = json.loads(data)
        if not isinstance(tree, dict):
            return
        config = InfopruneConfig.from_dict(tree)
        tower, layers = made[0]
        try:
            shape_like(tower, config.blocks)
            if config.language is not None:
                shape_language_like(layers, config.language)
        finally:
            if structure_of(tower) != whole or any(layer.num_neurons != neurons for layer in layers):
                made[0] = build()

    def read_json(data: bytes) -> None:
        try:
            json.loads(data)
        except (ValueError, RecursionError):
            return  # transformers reads config.json, and says so itself
        read(data)

    return examples, read_json


def _model(folder: Path) -> tuple[Sequence[bytes], Read]:
    from infoprune_export.models.vlm import check_model
    from infoprune_export.recipe import ModelSpec

    (folder / "model.safetensors").write_bytes(b"")
    path = folder / "config.json"
    example = json.dumps({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}).encode()
    return [example], _file(path, lambda: check_model(ModelSpec(name_or_path=str(folder))))


def _profile(folder: Path) -> tuple[Sequence[bytes], Read]:
    from infoprune_export.cli.engine_commands import _read_profile

    path = folder / "profile.json"
    tree = {"pixel_values": {"min": [1, 3, 112, 112], "opt": [2, 3, 112, 112], "max": [4, 3, 112, 112]}}
    return [json.dumps(tree).encode()], _file(path, lambda: _read_profile(path).to_dict())


def _engine(folder: Path) -> tuple[Sequence[bytes], Read]:
    from infoprune_export.engine.tensorrt import runtime
    from infoprune_export.recipe import load_target

    target = load_target("jetson-orin-jp62").model_dump(mode="json")
    profile = {"pixel_values": {"min": [1, 3, 112, 112], "opt": [2, 3, 112, 112], "max": [4, 3, 112, 112]}}
    tree = {
        "compatibility": {"tensorrt": "10.3.0", "sm": "87", "architecture": "aarch64"},
        "hashes": {runtime.PLAN: "0" * 64},
        "target": target,
        "profile": profile,
    }
    path = folder / runtime.RECORD
    return [json.dumps(tree).encode()], _file(path, lambda: runtime._read(folder))


READERS: dict[str, Reader] = {
    "recipe": Reader("yaml", 0.25, _recipe),
    "target": Reader("yaml", 0.15, _target),
    "set": Reader("text", 0.5, _setting("set")),
    "grid": Reader("text", 0.5, _setting("grid")),
    "recorded-recipe": Reader("json", 1, _recorded_recipe),
    "manifest": Reader("json", 1, _manifest),
    "kit-report": Reader("json", 1, _kit("report")),
    "kit-manifest": Reader("json", 1, _kit("manifest")),
    "run-report": Reader("json", 0.5, _run_report),
    "checkpoint": Reader("json", 0.05, _checkpoint),
    "model": Reader("json", 0.5, _model),
    "profile": Reader("json", 0.5, _profile),
    "engine": Reader("json", 0.5, _engine),
    "image": Reader("bytes", 0.5, _image),
    "vqav2-questions": Reader("json", 1, _dataset("vqav2", "q.json")),
    "vqav2-annotations": Reader("json", 1, _dataset("vqav2", "a.json")),
    "textvqa": Reader("json", 1, _dataset("textvqa", "val.json")),
    "textvqa-ocr": Reader("json", 0.5, _dataset("textvqa", "ocr.json")),
    "gqa": Reader("json", 1, _dataset("gqa", "testdev.json")),
    "pope": Reader("json lines", 1, _dataset("pope", "coco/coco_pope_random.json")),
    "mme": Reader("text", 1, _dataset("mme", "MME_Benchmark_release/existence/0001.txt")),
    "mmbench": Reader("text", 1, _dataset("mmbench", "dev.tsv")),
    "mmbench_cn": Reader("text", 0.5, _dataset("mmbench_cn", "dev.tsv")),
    "scienceqa": Reader("json", 1, _dataset("scienceqa", "problems.json")),
    "scienceqa-splits": Reader("json", 0.5, _dataset("scienceqa", "pid_splits.json")),
    "vizwiz": Reader("json", 1, _dataset("vizwiz", "val.json")),
    "hub": Reader("json", 1, _hub),
}
