"""Importing the package makes transformers read pruned checkpoints: in fresh interpreters, in every order."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOAD = """
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
print([len(p) for name, p in model.named_parameters() if name.endswith("layers.0.mlp.fc1.weight")])
"""
REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
record = AUTO_QUANTIZATION_CONFIG_MAPPING["infoprune"].from_dict({"blocks": []})
from infoprune_export.rewrite import checkpoint
assert type(record) is checkpoint.InfopruneConfig
assert AUTO_QUANTIZATION_CONFIG_MAPPING["infoprune"] is checkpoint.InfopruneConfig
assert AUTO_QUANTIZER_MAPPING["infoprune"] is checkpoint._PrunedStructure
"""


def python(code: str, *arguments: object, path: str = "", options: str = "-P") -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds this package, and what `path` names before everything else."""
    parts = (path, str(ROOT), os.environ.get("PYTHONPATH", ""))
    return subprocess.run(
        [sys.executable, *options.split(), "-c", f"import sys\n{code}", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, parts))},
        capture_output=True,
        text=True,
        check=False,
    )


def output_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small LLaVA whose first block lost a head and half of its FFN."""
    from infoprune_export.data import testbed
    from infoprune_export.models import tower_of
    from infoprune_export.rewrite.checkpoint import save

    model = testbed.build_model(layers=2, hidden_size=32, heads=4, seed=3)
    tower = tower_of(model)
    tower.blocks[0].keep_heads([0, 2, 3])
    tower.blocks[0].keep_neurons(range(64))
    folder = tmp_path_factory.mktemp("pruned")
    save(model, testbed.build_processor(), tower, folder)
    return folder


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A transformers with nothing but the register, for what depends on imports alone; the real one takes seconds."""
    folder = tmp_path_factory.mktemp("stand-in")
    for name, text in {
        "__init__.py": "__version__ = 'x'",
        "utils/__init__.py": "",
        "utils/quantization_config.py": (
            "class QuantizationConfigMixin:\n    @classmethod\n    def from_dict(cls, record): return cls(**record)"
        ),
        "quantizers/__init__.py": "from .auto import HfQuantizer",
        "quantizers/auto.py": (
            "AUTO_QUANTIZATION_CONFIG_MAPPING = {}; AUTO_QUANTIZER_MAPPING = {}\nclass HfQuantizer: pass\n"
        ),
    }.items():
        file = folder / "transformers" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return str(folder)


# ── Order of imports ─────────────────────────────────────────────────────────


@pytest.mark.exhaustive
def test_read_when_we_are_imported_first(checkpoint):
    assert (
        output_of(python(f"import infoprune_export; assert 'transformers' not in sys.modules{LOAD}", checkpoint))
        == "[64]\n"
    )


def test_refused_without_us_and_read_when_we_are_imported_last(checkpoint):
    refused = (
        f"try:{LOAD.replace(chr(10), chr(10) + '    ')}\nexcept RuntimeError as error: print(type(error).__name__)\n"
    )
    assert output_of(python(f"{refused}import infoprune_export{LOAD}", checkpoint)) == "RuntimeError\n[64]\n"


@pytest.mark.parametrize(
    "imports",
    [
        "import infoprune_export, transformers.quantizers",
        "import infoprune_export, transformers.quantizers.auto",
        "import transformers, infoprune_export; from transformers.quantizers.auto import HfQuantizer",
        "import transformers.quantizers.auto, infoprune_export",
        "import infoprune_export.rewrite.checkpoint",
        "from threading import Thread as T; import infoprune_export; ts = [T(target=__import__, args=(name,)) for name"
        " in ('transformers.quantizers', 'infoprune_export.rewrite.checkpoint', 'transformers.quantizers')]\n"
        "for t in ts: t.start()\nfor t in ts: t.join()",
    ],
)
def test_every_way_to_import_registers(stand_in, imports):
    done = python(imports + REGISTERED, path=stand_in)
    assert output_of(done) == ""
    assert done.stderr == ""


def test_once_only_and_without_a_trace(stand_in):
    code = (
        "import importlib, infoprune_export; importlib.reload(infoprune_export)\n"
        "print(sum(type(f).__module__ == 'infoprune_export._registration' for f in sys.meta_path))\n"
        "import transformers.quantizers.auto as q; importlib.reload(infoprune_export); importlib.reload(q)\n"
        "print(type(q.__spec__.loader).__name__, type(q.__loader__).__name__)"
    )
    assert output_of(python(code + REGISTERED, path=stand_in)) == "1\nSourceFileLoader SourceFileLoader\n"


def test_other_hooks_still_have_their_say(stand_in):
    """One in front of ours and one behind it; each asks every finder."""
    code = (
        "import importlib.util\n"
        "class Hook:\n"
        "    busy = False\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name != 'transformers.quantizers.auto' or self.busy: return None\n"
        "        self.busy = True; spec = importlib.util.find_spec(name); self.busy = False\n"
        "        print('asked'); return spec\n"
        "sys.meta_path.insert(0, Hook()); import infoprune_export; sys.meta_path.insert(0, Hook())\n"
        "import transformers.quantizers.auto as q; print(type(q.__spec__.loader).__name__)"
    )
    assert output_of(python(code + REGISTERED, path=stand_in)) == "asked\nasked\nSourceFileLoader\n"


# ── What it costs ────────────────────────────────────────────────────────────


def test_our_import_imports_neither_torch_nor_transformers():
    code = (
        "import time; begin = time.process_time(); import infoprune_export; spent = time.process_time() - begin\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'onnx', 'optimum', 'click') if m in sys.modules], spent)"
    )
    runs = [output_of(python(code)).rpartition(" ") for _ in range(3)]
    assert {imported for imported, _, _ in runs} == {"[]"}
    assert min(float(spent) for _, _, spent in runs) < 0.05


def test_help_stays_fast():
    code = (
        "import time; from infoprune_export.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(time.process_time(), file=sys.stderr)"
    )
    assert min(float(python(code).stderr) for _ in range(3)) < 0.15


# ── When something is missing or broken ──────────────────────────────────────


def test_without_transformers_installed():
    """-S leaves out site-packages."""
    code = (
        "import infoprune_export\n"
        "for name in ('transformers', 'transformers.quantizers'):\n"
        "    try: __import__(name)\n"
        "    except ModuleNotFoundError as error: print(error)"
    )
    assert output_of(python(code, options="-S -P")) == "No module named 'transformers'\n" * 2


def test_our_failure_shows_when_a_pruned_checkpoint_is_loaded(stand_in):
    code = (
        "sys.modules['infoprune_export.models'] = None; import infoprune_export, transformers.quantizers.auto as auto\n"
        "print('imported'); auto.AUTO_QUANTIZATION_CONFIG_MAPPING['infoprune'].from_dict({})"
    )
    done = python(code, path=stand_in)
    assert done.stdout == "imported\n"
    *_, last = done.stderr.splitlines()
    assert "InfopruneError: pruned checkpoints cannot be read with transformers x (ModuleNotFoundError: " in last
    assert "infoprune_export.models" in last


def test_a_transformers_of_another_shape_is_imported(tmp_path):
    """One without a register, and one whose first import fails."""
    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "auto.py").write_text("import sys\nif not sys.tries: sys.tries = 1; raise ImportError('first')")
    code = (
        "sys.tries = 0; import infoprune_export\n"
        "try: import transformers.quantizers.auto\n"
        "except ImportError as error: print(error)\n"
        "import transformers.quantizers.auto as auto; print(auto.__file__)"
    )
    assert output_of(python(code, path=str(tmp_path))) == f"first\n{package / 'auto.py'}\n"
