"""What a user installs must be complete."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_carries_recipes_targets_template_and_testbed(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for expected in (
        "infoprune_export/assets/recipes/quickstart.yaml",
        "infoprune_export/assets/targets/onnxruntime-cpu.yaml",
        "infoprune_export/assets/targets/jetson-orin-jp62.yaml",
        "infoprune_export/assets/token_select/token_select.ptx",
        "infoprune_export/assets/kit/verify.py",
        "infoprune_export/validate/report.html.j2",
        "infoprune_export/analysis/analysis.html.j2",
        "infoprune_export/data/checkpoints/tiny-llava/model.safetensors",
        "infoprune_export/data/checkpoints/tiny-llava/processor_config.json",
    ):
        assert expected in names, expected


def test_installed_wheel_finds_its_recipes(wheel, tmp_path):
    """Unpacked away from the source tree, as pip would do it."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import infoprune_export, pathlib; from infoprune_export.recipe import assets, load_recipe, load_target;"
        f"assert pathlib.Path(infoprune_export.__file__).is_relative_to({str(tmp_path)!r});"
        "assert 'quickstart' in assets('recipes'); r = load_recipe('quickstart'); load_target(r.engine.target)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True)


def test_wheel_carries_one_file_of_the_optimum_namespace(wheel):
    """An __init__.py there would hide optimum itself."""
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("optimum/")]
    assert names == ["optimum/commands/register/register_infoprune.py"]


def test_optimum_finds_our_command_in_an_installed_wheel(wheel, tmp_path):
    assert str(tmp_path) in _optimum_help(wheel, tmp_path)


def test_optimum_finds_our_command_in_an_editable_install(tmp_path):
    """What `pip install -e` puts into site-packages is what this wheel holds."""
    build = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    assert str(ROOT) in _optimum_help(next(tmp_path.glob("*.whl")), tmp_path)


def _optimum_help(wheel: Path, folder: Path) -> str:
    """Run ``optimum-cli export infoprune --help`` with only this wheel of ours; returns where our package came from."""
    site = folder / "site"
    site.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "infoprune" in entry.name or entry.suffix == ".pth":
            continue
        if entry.name == "optimum":
            # An install of ours left its file among optimum's.
            shutil.copytree(entry, site / entry.name, ignore=shutil.ignore_patterns("*infoprune*", "__pycache__"))
        else:
            (site / entry.name).symlink_to(entry)
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import site, sys; site.addsitedir({str(site)!r}); sys.argv[1:] = ['export', 'infoprune', '--help']\n"
        "from optimum.commands.optimum_cli import main\n"
        "try: main()\n"
        "finally: print(sys.modules['infoprune_export'].__file__, 'torch' in sys.modules)"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-S", "-P", "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--keep-ratio" in done.stdout
    origin, imported = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert imported == "False"
    return origin


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    required = [
        *project["dependencies"],
        *project["optional-dependencies"]["cpu"],
        *project["optional-dependencies"]["dev"],
    ]
    names = {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower().replace("_", "-") for line in required}
    assert names <= pinned, names - pinned


def test_readme_names_only_commands_and_files_that_exist():
    from infoprune_export.cli import main

    readme = (ROOT / "README.md").read_text()
    for command in re.findall(r"infoprune-export ([a-z-]+)", readme):
        assert command in main.commands, command
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert link.startswith("http") or (ROOT / link).exists(), link
    targets = re.findall(r"^make (\w+)", readme, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["quickstart", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_no_forbidden_shortcut_is_in_the_package():
    forbidden = re.compile(r"torch\.load\(|import pickle|trust_remote_code=True|ignore_mismatched_sizes=True")
    for path in (ROOT / "infoprune_export").rglob("*.py"):
        assert not forbidden.search(path.read_text()), path
