"""What a run hands to its report, small and made up, and such runs as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from infoprune_export.artifacts import canonical_json, staged, write_manifest
from infoprune_export.recipe import load_recipe
from infoprune_export.validate import plots, report_json
from infoprune_export.validate.report import render

STEPS = (("original", 90), ("heads", 89), ("ffn", 88), ("tokens", 87.5), ("onnx", 87.5), ("engine", 87.5))


def estimate(percent: float) -> dict[str, Any]:
    return {"percent": percent, "standard_error": 0.5, "questions": 100}


def row(step: str, percent: float, first: float, previous: float | None = None) -> dict[str, Any]:
    return {
        "step": step,
        "meaning": f"meaning of {step}",
        **estimate(percent),
        "to_original": estimate(percent - first),
        "to_previous": estimate(percent - (percent + 0.1 if previous is None else previous)),
        "by_kind": {"color": 99.0, "text": 80.0},
    }


def rows_of(steps: Any) -> list[dict[str, Any]]:
    values = [value for _, value in steps]
    return [
        row(step, value, values[0], before)
        for (step, value), before in zip(steps, [values[0], *values[:-1]], strict=True)
    ]


def check(what: str, value: float | None, limit: float, *, passed: bool, at_least: bool = False) -> dict[str, Any]:
    return {"what": what, "passed": passed, "value": value, "limit": limit, "detail": "worst", "at_least": at_least}


def percentiles(p50: float) -> dict[str, Any]:
    return {
        "p50": p50,
        "p90": p50 + 0.5,
        "p99": p50 + 1.0,
        "intervals": {
            "p50": {"low": p50 - 0.1, "high": p50 + 0.1},
            "p90": {"low": p50 + 0.3, "high": p50 + 0.9},
            "p99": {"low": None, "high": None},
        },
    }


def ratio(median: float) -> dict[str, Any]:
    low, high = median - 0.1, median + 0.1
    return {"median": median, "low": low, "high": high, "confidence": 0.95, "observations": 15, "effective": 12.5}


def output_parity(*, passed: bool) -> dict[str, Any]:
    return {
        "relative_error": 1e-6 if passed else 0.3,
        "cosine": 1.0,
        "norm_ratio": 1.0,
        "tolerance": 1e-4,
        "min_cosine": 0.999,
        "passed": passed,
    }


def peers() -> list[dict[str, Any]]:
    def timed(name: str, *, right: bool) -> dict[str, Any]:
        return {
            "peer": name,
            "side": "original",
            "version": "2.13.0",
            "reason": None,
            "milliseconds": percentiles(3.0),
            "speedup": ratio(0.7),
            "parity": output_parity(passed=right),
            "prepare_seconds": 4.0,
        }

    missing = {
        "peer": "openvino",
        "side": "original",
        "version": None,
        "reason": "not installed; pip install openvino",
        "milliseconds": None,
        "speedup": None,
        "parity": None,
        "prepare_seconds": None,
    }
    return [timed("torch-eager", right=True), timed("fast-and-wrong", right=False), missing]


def bench(speedup: float = 1.9) -> dict[str, Any]:
    """As `measure.results.BenchResult`."""
    return {
        "target": "onnxruntime-cpu",
        "provider": "CPUExecutionProvider",
        "threads": 1,
        "rounds": 30,
        "warmup": 3,
        "max_interval": 0.05,
        "machine": {
            "processor": "a processor",
            "cores": 2,
            "governor": "not reported",
            "system": "Linux 6",
            "load": 0.5,
            "gpus": [],
            "power_mode": None,
        },
        "libraries": {"torch": "2.13.0", "onnxruntime": "1.23.0"},
        "rows": [
            {
                "batch_size": 4,
                "rounds": 30,
                "stopped": "narrow",
                "milliseconds": {"original": percentiles(2.0 * speedup), "compressed": percentiles(2.0)},
                "speedup": ratio(speedup),
                "flops": {"original": 200, "compressed": 100},
                "flop_ratio": 2.0,
                "efficiency": 0.95,
                "parity": {},
                "peers": [],
                "memory": {},
            }
        ],
    }


def page_inputs() -> dict[str, Any]:
    """A run that fails because its ONNX file is not finite, with a variant, gates and one picture."""
    rows = rows_of(STEPS)
    parity = {
        "step": "onnx",
        "case": "1 image",
        "relative_error": None,
        "cosine": 1.0,
        "norm_ratio": 1.0,
        "tolerance": 1e-4,
        "kept_suboptimality": 0.0,
        "replay_tolerance": 0.01,
        "min_cosine": 0.999,
        "passed": False,
    }
    return {
        "name": "quickstart",
        "description": "<script>alert(1)</script>",
        "recipe": load_recipe("quickstart").to_dict(),
        "validation": {
            "verdict": "FAIL",
            "metric": "VQA accuracy",
            "checks": [
                check("PyTorch = ONNX", None, 1e-4, passed=False),
                check("accuracy lost, points", 2.5, 4.0, passed=True),
            ],
            "parity": [parity],
            "accuracy": rows,
            "size": {
                "flops_per_image": {"original": 200_000_000, "compressed": 100_000_000},
                "block_parameters": {"original": 10, "compressed": 5},
                "visual_tokens": {"original": 64, "compressed": 32},
                "heads_removed": 0.5,
                "ffn_macs_kept": 0.5,
            },
            "heads": {"total": [4, 4], "kept": [[0, 2], []]},
            "ffn": {
                "widths": [128, 128],
                "choices": [
                    {"kind": "mlp", "neurons": [1, 2], "rank": 0},
                    {"kind": "linear", "neurons": [], "rank": 9},
                ],
            },
            "kept_tokens": [{"image": "scene_1.png", "kept": [0, 5, 63]}],
        },
        "budget": {"allocation": None, "table": None},
        "bench": bench(),
        "variants": {
            "paper": {
                "heads_removed": 0.1,
                "ffn_macs_kept": 0.2,
                "tokens_kept": 0.5,
                "methods": {"heads": "paper", "ffn": "paper", "tokens": "infoprune"},
                "accuracy": rows[:4],
            }
        },
        "history": [{"task": 0.3, "sparsity": 30.0, "erank": -0.1, "distance": 0.05, "mean_gate": 0.9}] * 2,
        "recovery": [],
        "pictures": [plots.kept_tokens(np.zeros((112, 112, 3), np.uint8), [0, 5, 63], 8, 8)],
        "artefacts": {},
        "attribution": None,
    }


BUILT = ("name", "description", "recipe", "validation", "bench", "variants", "artefacts", "attribution")
DRAWN = ("validation", "budget", "variants", "history", "recovery", "pictures")


def report_of(inputs: dict[str, Any]) -> Any:
    return report_json.build(**{key: inputs[key] for key in BUILT})


def page_of(inputs: dict[str, Any]) -> str:
    return render(report_of(inputs), **{key: inputs[key] for key in DRAWN})


def attribution(blocks: int = 3) -> dict[str, Any]:
    """As `validate.attribution_schema.Attribution`: fp16 overflows in block 1's FFN."""

    def worst(error: float | None) -> dict[str, Any]:
        return {"cosine": 0.99, "norm_ratio": 1.01, "relative_error": error, "case": "3 images"}

    def step(name: str, *, exact: bool, error: float | None) -> dict[str, Any]:
        passed = error is not None
        return {
            "step": name,
            "meaning": f"meaning of {name}",
            "to_original": worst(0.3),
            "to_previous": worst(error),
            "tokens_kept": 0.5,
            "kept_in_common": 1.0 if exact else None,
            "exact": exact,
            "parity": worst(error) if exact else None,
            "kept_suboptimality": None,
            "tolerance": 3e-2 if exact else None,
            "min_cosine": 0.9995 if exact else None,
            "passed": passed,
            "accuracy": 88.0,
            "accuracy_to_previous": None if name == "original" else -1.0,
        }

    def part(name: str, block: int | None, error: float | None) -> dict[str, Any]:
        return {
            "step": "precision",
            "part": name,
            "block": block,
            "boundary": name.removesuffix(".ffn"),
            "value": worst(1e-3),
            "added": None if block is None else worst(error),
            "kept_suboptimality": None,
            "tolerance": 3e-2,
            "min_cosine": 0.999,
            "judged": True,
            "passed": error is not None,
        }

    original = {**step("original", exact=False, error=0.0), "to_original": None, "to_previous": None}
    parts = [part("embedding", None, 1e-3)]
    for block in range(blocks):
        parts += [
            part(f"blocks.{block}.attention", block, 1e-4 * 10 ** (block % 3)),
            part(f"blocks.{block}.ffn", block, None if block == 1 else 2e-3),
        ]
    return {
        "schema_version": 1,
        "steps": [
            original,
            step("heads", exact=False, error=0.1),
            step("onnx", exact=True, error=1e-6),
            step("precision", exact=True, error=None),
        ],
        "blocks": parts,
        "limits": {"precision": "fp16 keeps eleven bits"},
        "broken": [
            {
                "step": "precision",
                "part": "blocks.1.ffn",
                "reason": "values beyond 65504, the largest of fp16",
                "nodes": ["blocks.1.ffn/MatMul", "blocks.1.ffn/MatMul_1"],
                "overflow": [{"node": "blocks.1.ffn/MatMul", "value": "val_7", "largest": 131000.0}],
                "fix": "--set export.keep_fp32=[blocks.1.ffn]",
            }
        ],
    }


# ── Folders ──────────────────────────────────────────────────────────────────


def scores(steps: Any, seed: int, images: int = 25) -> dict[str, Any]:
    """Of 4 questions an image: right or wrong, about as often as `steps` say in percent."""
    rng = np.random.default_rng(seed)
    luck = rng.random(4 * images)
    return {
        "questions_sha256": "a" * 64,
        "clusters": [4] * images,
        "scores": {step: (100 * luck < percent).astype(float).tolist() for step, percent in steps},
    }


def finish(folder: Path, stage: str, files: dict[str, str]) -> Path:
    """A finished stage with these files."""
    with staged(folder / stage) as staging:
        for name, text in files.items():
            (staging / name).write_text(text, encoding="utf-8")
        write_manifest(staging, stage=stage, key="k" * 64, inputs={}, recipe={})
    return folder / stage


def write_run(folder: Path, inputs: dict[str, Any], given: dict[str, Any] | None, data: str = "the data") -> Path:
    """A run's folder with what is read of it: data, validation, report. Without `given` it has no scores."""
    folder.mkdir()
    (folder / "recipe.json").write_text(canonical_json(inputs["recipe"]), encoding="utf-8")
    validation = {"validation.json": canonical_json(inputs["validation"])}
    if given is not None:
        validation["scores.json"] = json.dumps(given)
    stages = {
        "data": finish(folder, "data", {"files.json": data}),
        "baseline": finish(folder, "baseline", {"answers.json": "[]"}),
        "validation": finish(folder, "validation", validation),
    }
    report = report_of({**inputs, "artefacts": report_json.describe(stages)})
    finish(folder, "report", {"report.json": report_json.dumps(report), "report.html": "<p>page</p>"})
    return folder
