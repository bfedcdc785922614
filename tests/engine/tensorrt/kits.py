"""A machine that kits are run on: another process, whose environment holds NumPy and a stand-in for TensorRT only."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from sharing import shared

from infoprune_export.engine.tensorrt.kit import KitSource
from infoprune_export.export.onnx import MODEL, export_onnx
from infoprune_export.models import tower_of
from infoprune_export.models.vlm import VLM, cast
from infoprune_export.models.zoo import random_model
from infoprune_export.recipe import load_recipe, load_target

STANDIN = Path(__file__).parent / "standin"
ORIN = load_target("jetson-orin-jp62").model_copy(update={"token_select": "function"})
SETTINGS = {
    "llava": ["engine.images=[1,2,4]"],
    "llava-fp16": ["engine.images=[1,2,4]", "export.precision=fp16"],
    "qwen2.5-vl": ["engine.image_sizes=[[28,28],[56,70],[84,112]]"],
}
"""Calls of 1, 2 and 4 images of 56 x 56, and single images of 2 x 2 to 6 x 8 visual tokens."""


def exported(family, factory):
    """A small random encoder with selection and its ONNX file, made when a test of the session first asks."""
    recipe = load_recipe("quickstart", SETTINGS[family])
    model = random_model(family.removesuffix("-fp16"), 3, seed=4)
    vlm = VLM(model, SimpleNamespace(), tower_of(model))

    def make(folder):
        tower = cast(vlm, recipe.export.dtype).tower
        export_onnx(tower, recipe.tokens, folder, opset=20, several=recipe.export.several)

    return KitSource(recipe, vlm, shared(factory, f"kit-{family}", make) / MODEL, ORIN)


def driver(factory):
    """The stand-in libcuda.so.1, compiled."""
    library = factory.getbasetemp() / "driver" / "libcuda.so.1"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in driver")
    if not library.is_file():
        library.parent.mkdir(exist_ok=True)
        source = STANDIN / "libcuda.c"
        subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def machine(factory):
    """A function that runs a script of a kit on the machine; environment variables plant faults, see the stand-ins.

    Its attribute `packages` is a folder with NumPy and no TensorRT.
    """
    library, packages = driver(factory), factory.mktemp("packages")
    for name in ("numpy", "onnxruntime"):
        folder = Path(importlib.util.find_spec(name).origin).parent
        (packages / name).symlink_to(folder)
        if (libraries := folder.with_name(f"{name}.libs")).is_dir():
            (packages / libraries.name).symlink_to(libraries)

    def run(script, *arguments, kit, **environment):
        variables = {
            "PATH": "/nowhere",
            "PYTHONPATH": f"{packages}{os.pathsep}{STANDIN}",
            "LD_LIBRARY_PATH": str(library.parent),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        command = [sys.executable, "-S", "-B", kit / script, *arguments]
        return subprocess.run(command, env=variables, cwd="/", capture_output=True, text=True, timeout=120)

    run.packages = packages
    return run
