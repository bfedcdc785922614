"""Verify the built engine against PyTorch's golden outputs: python3 verify.py

Runs every golden case inside the engine's profile, counts fused attention kernels, measures latency, and writes
report.json. Exit codes: 0 passed, 1 failed (the report says why), 2 refused (nothing was judged, no report).
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from compare import judge
from device import Session, load_plugin, open_device
from shared import FOLDER, REPORT, SCHEMA_VERSION, KitError, outside, read_case, read_engine, read_kit, run, write_json
from timing import measure

# Names of fused attention kernels; a layer's own name may hold a module's name, so it is not looked at.
_FUSED = re.compile(r"mha|flash_?attention", re.IGNORECASE)


def main() -> int:
    parser = argparse.ArgumentParser(description="Verify this kit's engine on this device.")
    parser.add_argument("--rounds", type=int, default=100, help="calls that are timed [100]")
    arguments = parser.parse_args()
    if arguments.rounds < 3:
        raise KitError(f"--rounds {arguments.rounds}: three are the least")
    if (FOLDER / REPORT).exists():
        (FOLDER / REPORT).unlink()
    manifest, kit = read_kit()
    cuda, session, engine = open_engine(manifest, kit)
    profile, reasons = session.profile(), []
    if profile != manifest["profiles"][engine["profile_level"]]:
        raise KitError("the engine's profile is not the kit's; run build.py again")
    cases, latency = [], []
    for case in manifest["cases"]:
        golden = read_case(case)
        problem = outside(profile, golden["input"])
        figures: dict[str, Any] = {}
        if not problem:
            session.load(golden["input"])
            session.enqueue()
            figures, problems = judge(golden, session.fetch(), manifest["selection"], manifest["tolerances"])
            reasons += [f"{case['name']}: {one}" for one in problems]
            if case["name"] in manifest["timed"]:
                latency.append({"case": case["name"], **measure(cuda, session, arguments.rounds, warmup=10)})
        elif not engine["profile_level"]:
            reasons.append(f"{case['name']}: {problem}")
        cases.append({"case": case["name"], "outside": problem, "outputs": figures or None})
        print(f"{case['name']:<24} {describe(cases[-1])}", flush=True)
    if all(case["outside"] for case in cases):
        reasons.append("no golden case lies inside the engine's profile")
    attention = count_attention(session, manifest["attention"]["expected_fused"])
    if attention["fused"] < attention["expected"]:
        reasons.append(f"fused attention in {attention['fused']} of {attention['expected']} layers")
    report = {
        "schema_version": SCHEMA_VERSION,
        "kit": kit,
        "name": manifest["name"],
        "target": manifest["target"]["name"],
        "engine": {
            **engine["compatibility"],
            "plan_sha256": engine["plan_sha256"],
            "profile_level": engine["profile_level"],
        },
        "cases": cases,
        "attention": attention,
        "latency": latency,
        "verdict": "FAIL" if reasons else "PASS",
        "reasons": reasons,
    }
    write_json(FOLDER / REPORT, report)
    for reason in reasons:
        print(f"  {reason}")
    print(f"{report['verdict']}; take {REPORT} home and run: infoprune-export validate --kit-report {REPORT}")
    return 1 if reasons else 0


def open_engine(manifest: dict[str, Any], kit: str) -> tuple[Any, Session, dict[str, Any]]:
    """The device, the engine on it, and the engine's record; everything fits, or is refused."""
    plan, engine = read_engine(manifest, kit)
    cuda, trt, log = open_device(manifest)
    built = engine["compatibility"]
    if not manifest["target"]["version_compatible"] and built["tensorrt"] != trt.__version__:
        raise KitError(f"the engine was built by TensorRT {built['tensorrt']}, here is {trt.__version__}; build again")
    if not manifest["target"]["hardware_compatible"] and built["sm"] != str(cuda.sm):
        raise KitError(f"the engine was built for SM {built['sm']}, {cuda.name} has {cuda.sm}; build again")
    if load_plugin(trt, manifest) != engine["plugin_sha256"]:
        raise KitError("the plugin library was compiled anew since the engine was built; run build.py again")
    return cuda, Session(cuda, trt, log, plan, manifest), engine


def count_attention(session: Session, expected: int) -> dict[str, int]:
    """How many layers of the engine run a fused attention kernel, from its inspector."""
    try:
        layers = json.loads(session.layers())["Layers"]
    except (ValueError, KeyError, TypeError):
        raise KitError("the engine tells nothing about its layers; run build.py again") from None
    if not all(isinstance(layer, dict) for layer in layers):
        raise KitError("the engine holds only names of its layers; run build.py again, which asks for details")
    fused = sum(any(_FUSED.search(str(layer.get(key, ""))) for key in ("TacticName", "LayerType")) for layer in layers)
    return {"fused": fused, "expected": expected, "layers": len(layers)}


def describe(case: dict[str, Any]) -> str:
    """One line about a case's figures."""
    if case["outside"]:
        return f"not run: {case['outside']}"
    parts = []
    for name, figures in sorted((case["outputs"] or {}).items()):
        if "max_error" in figures:
            error = "not finite" if figures["max_error"] is None else f"{figures['max_error']:.2e}"
            parts.append(f"{name} error {error} ({figures['compared']} of {figures['rows']} rows)")
        else:
            parts.append(f"{name} {'equal' if figures['equal'] else 'overlap {:.3f}'.format(figures['overlap'])}")
    return "; ".join(parts) or "outputs of another shape"


if __name__ == "__main__":
    run(main)
