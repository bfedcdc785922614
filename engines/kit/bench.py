"""Measure the engine's latency on several shapes: python3 bench.py

Writes bench.json. Exit codes: 0 measured, 2 refused. Fix the clocks first where you can (Jetson: sudo nvpmodel -m 0,
sudo jetson_clocks); the clocks before and after each measurement are part of the result.
"""

from __future__ import annotations

import argparse
from typing import Any

from shared import FOLDER, KitError, outside, read_case, read_kit, run, write_json
from timing import measure
from verify import open_engine


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure this kit's engine on this device.")
    parser.add_argument("--rounds", type=int, default=300, help="calls a pass [300]")
    parser.add_argument("--passes", type=int, default=3, help="times that all shapes are gone through [3]")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this golden case; repeatable")
    parser.add_argument("--cuda-graph", action="store_true", help="launch each call as one CUDA graph")
    arguments = parser.parse_args()
    if arguments.rounds < 3 or arguments.passes < 1:
        raise KitError(f"--rounds {arguments.rounds} --passes {arguments.passes}: at least 3 rounds and 1 pass")
    manifest, kit = read_kit()
    names = [case["name"] for case in manifest["cases"]]
    unknown = sorted(set(arguments.case or ()) - set(names))
    if unknown:
        raise KitError(f"--case {unknown[0]}: there are {', '.join(names)}")
    cuda, session, engine = open_engine(manifest, kit)
    profile = session.profile()
    results: dict[str, list[dict[str, Any]]] = {}
    # Shapes take turns, so that a device that warms up slows all of them alike.
    for number in range(arguments.passes):
        for case in manifest["cases"]:
            if arguments.case and case["name"] not in arguments.case:
                continue
            inputs = read_case(case)["input"]
            if outside(profile, inputs):
                continue
            session.load(inputs)
            result = measure(cuda, session, arguments.rounds, warmup=20, graph=arguments.cuda_graph)
            results.setdefault(case["name"], []).append(result)
            times = result["device_ms"]
            print(
                f"pass {number + 1}  {case['name']:<24} p50 {times['p50']:9.3f} ms  p90 {times['p90']:9.3f} ms  "
                f"p99 {times['p99']:9.3f} ms",
                flush=True,
            )
    if not results:
        raise KitError("no golden case lies inside the engine's profile; build again with more memory")
    write_json(FOLDER / "bench.json", {"schema_version": 1, "kit": kit, "engine": engine, "cases": results})
    return 0


if __name__ == "__main__":
    run(main)
