"""The CUDA kernel: its source run on the host against NumPy, and the PTX that is shipped of it."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selections import KINDS, image, padded, vectors
from wheels import REPOSITORY, compiler, unpacked

from infoprune_export.shipped import shipped_folder
from infoprune_export.tokens import kernel, reference
from infoprune_export.tokens.kernel import Settings
from infoprune_export.tokens.select import keep_count, pool_count

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)
GUARD = 16
"""Values behind every buffer that must stay as they are."""

# ── The source on the host ───────────────────────────────────────────────────


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel's source, compiled for this machine."""
    folder = tmp_path_factory.mktemp("kernel")
    source, binary = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(f'#include "{shipped_folder("token_select") / "token_select.cuh"}"\n')
    options = ["-std=c++17", "-DTOKEN_SELECT_HOST", "-O2", "-shared", "-fPIC"]
    subprocess.run([compiler("c++", "g++", "clang++"), *options, str(source), "-o", str(binary)], check=True)
    loaded = ctypes.CDLL(str(binary))
    loaded.token_select_host.restype = ctypes.c_longlong
    return loaded


def run(
    library: ctypes.CDLL,
    features: torch.Tensor,
    prior: np.ndarray,
    counts: np.ndarray,
    options: Settings,
    threads: int = 64,
    backwards: bool = False,
) -> np.ndarray:
    """Kept tokens int32 [B, T]. Scratch starts as NaN, and nothing may be written behind it."""
    batch, tokens, width = features.shape
    keep, work_size = kernel.keep_size(tokens, options), kernel.work_size(tokens, width, options)
    shared_size = kernel.shared_bytes(tokens, width, options, threads=threads) // 4
    kept = np.full(batch * keep + GUARD, -7, np.int32)
    work, shared = (
        np.full(batch * work_size + GUARD, np.nan, np.float32),
        np.full(shared_size + GUARD, np.nan, np.float32),
    )
    bits = features.contiguous().view({2: torch.int16, 4: torch.int32}[features.element_size()]).numpy()
    arrays = (bits, np.ascontiguousarray(prior, np.float32), counts.astype(np.int32), kept, work, shared)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
    kind = (torch.float32, torch.float16, torch.bfloat16).index(features.dtype)
    scalars = kernel.scalars(tokens, width, options)
    used = library.token_select_host(kind, batch, threads, int(backwards), *pointers[:3], *scalars, *pointers[3:])
    assert used <= work_size
    assert np.isnan(work[batch * work_size :]).all()
    assert np.isnan(shared[shared_size:]).all()
    assert (kept[batch * keep :] == -7).all()
    return kept[: batch * keep].reshape(batch, keep)


@dataclass
class Case:
    """A batch, and how it is selected from."""

    features: torch.Tensor
    prior: np.ndarray
    counts: np.ndarray
    options: Settings
    threads: int


SHARES = ((1, 9), (1, 3), (1, 2), (2, 3), (1, 1))
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def hundred_cases() -> Iterator[Case]:
    """Sizes from 1, ragged counts from 0, fewer dimensions than kept tokens, ties, copies, and what is not finite."""
    for number in range(100):
        rng = np.random.default_rng(number)
        tokens = (1, 2, 33, int(rng.integers(3, 260)))[number % 4]
        width = int(rng.integers(1, 200)) if number % 3 else int(rng.integers(1, 12))
        x = np.stack([vectors(KINDS[number % 6], rng, tokens, width) for _ in range(3)])
        prior = rng.random((3, tokens), np.float32)
        counts = np.array([tokens, rng.integers(0, tokens + 1), 0])
        if number % 5 == 0:
            prior = np.round(4 * prior)
        if number % 7 == 0:
            x[:, rng.integers(0, tokens, tokens // 2)] = x[:, :1]
        if number % 10 == 3:
            x[0, rng.integers(0, tokens), 0] = (math.nan, math.inf, -math.inf)[number // 10 % 3]
            prior[:, rng.integers(0, tokens)] = (math.inf, math.nan, -math.inf)[number // 10 % 3]
        x[np.arange(tokens) >= counts[:, None]] = math.nan
        features = torch.from_numpy(x.astype(np.float32)).to(TYPES[number % 11 % 3])
        factor = float(rng.choice([1, 1.25, 2, 8, 1e9]))
        yield Case(features, prior, counts, Settings(*SHARES[number % 5], factor), 32 * int(rng.integers(1, 33)))


def test_the_source_on_the_host_equals_numpy_on_100_cases(library: ctypes.CDLL):
    judged, compared = [], 0
    for number, case in enumerate(hundred_cases()):
        shares = case.options.keep_numerator, case.options.keep_denominator
        wide = case.features.float().numpy()
        expected = reference.token_select(wide, case.prior, case.counts, *shares, case.options.pool_factor)
        kept = run(library, case.features, case.prior, case.counts, case.options, case.threads, bool(number % 2))
        assert kept.shape == expected.shape
        for row, count in enumerate(case.counts):
            own = kept[row][kept[row] >= 0].astype(np.int64)
            assert kept[row].tolist() == [*sorted(set(own.tolist())), *[-1] * (kept.shape[1] - len(own))]
            assert len(own) == keep_count(int(count), *shares)
            compared += int(count > 0)
            if kept[row].tolist() != expected[row].tolist():
                judged.append(number)
                one = wide[row, :count], case.prior[row, :count]
                assert reference.replay(*one, own, case.options.pool_factor) <= 1e-4, number
    assert compared > 150
    assert len(judged) <= 2, judged


@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_pivots_equal_numpy(library: ctypes.CDLL, kind: str):
    """More pivots than two of NumPy's blocks, from more rows than two rounds of 512 threads have."""
    x, prior = vectors(kind, np.random.default_rng(7), 300, 400).astype(np.float32)[None], image(7, 300, 1)[1][None]
    kept = run(library, torch.from_numpy(x), prior, np.array([300]), Settings(1, 2, 2.0), threads=512)
    assert kept.tolist() == reference.token_select(x, prior, np.array([300]), 1, 2, 2.0).tolist()


@pytest.mark.parametrize("threads", [32, 96, 512, 1024])
def test_neither_the_number_of_threads_nor_their_order_matters(library: ctypes.CDLL, threads: int):
    """A thread that read what another one writes in the same phase would see other values in the other order."""
    features, prior, counts = padded([image(seed, size, 70) for seed, size in enumerate((131, 40, 1))])
    batch = torch.from_numpy(features), prior, counts
    expected = reference.token_select(features, prior, counts, 1, 3, 3.0).tolist()
    for backwards in (False, True):
        assert run(library, *batch, Settings(1, 3, 3.0), threads, backwards).tolist() == expected


@pytest.mark.parametrize("changed", [{"temperature": 0.05}, {"exponent": 4.0}, {"epsilon": 0.3}, {"pool_factor": 1.0}])
def test_every_setting_reaches_the_kernel(library: ctypes.CDLL, changed: dict[str, float]):
    features, prior = image(1, 24, 16)
    batch, count = (features[None], prior[None]), np.array([24])
    options = Settings(1, 3, **{"pool_factor": 3.0, **changed})
    kept = run(library, torch.from_numpy(batch[0]), batch[1], count, options)
    assert kept.tolist() == reference.token_select(*batch, count, **_as_reference(options)).tolist()
    assert kept.tolist() != run(library, torch.from_numpy(batch[0]), batch[1], count, Settings(1, 3, 3.0)).tolist()


def _as_reference(options: Settings) -> dict[str, float]:
    values = asdict(options)
    return {name.removeprefix("keep_"): value for name, value in values.items()}


def test_a_residual_at_the_threshold_is_saturated(library: ctypes.CDLL):
    """Also the first one, which is the threshold itself where epsilon is 1."""
    features, prior, count = np.diag([0.25, 0.5, 1.0]).astype(np.float32)[None], np.zeros((1, 3)), np.array([3])
    for epsilon, expected in ((0.25, [0, 2]), (0.2499, [1, 2]), (1.0, [0, 1])):
        options = Settings(2, 3, 2.0, epsilon=epsilon)
        assert run(library, torch.from_numpy(features), prior, count, options).tolist() == [expected]
        assert reference.token_select(features, prior, count, **_as_reference(options)).tolist() == [expected]


@pytest.mark.parametrize("value", [3e38, 1e30, 1e-30, 1e-38, 0.0], ids="{:g}".format)
def test_features_of_any_size_equal_numpy(library: ctypes.CDLL, value: float):
    features, prior = image(0, 40, 16)
    x = (np.sign(features) * (value if value > 1 else value * np.abs(features))).astype(np.float32)[None]
    kept = run(library, torch.from_numpy(x), prior[None], np.array([40]), Settings(1, 2, 2.0))
    assert kept.tolist() == reference.token_select(x, prior[None], np.array([40]), 1, 2, 2.0).tolist()


@pytest.mark.parametrize("scale", [1.0, 1e-19, 1e-22])
def test_without_a_threshold_every_slot_is_filled_all_the_same(library: ctypes.CDLL, scale: float):
    """Rounding errors are taken for residuals then."""
    rng = np.random.default_rng(3)
    x = np.concatenate([np.ones((1, 1, 64)), scale * rng.normal(size=(1, 79, 3)) @ rng.normal(size=(3, 64))], axis=1)
    options = Settings(7, 8, 1.0, exponent=0.0, epsilon=0.0)
    kept = run(library, torch.from_numpy(x.astype(np.float32)), np.zeros((1, 80)), np.array([80]), options)
    assert kept.tolist() == [sorted(set(kept[0].tolist()) & set(range(80)))]
    assert kept.shape == (1, 70)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_float_is_widened_exactly(library: ctypes.CDLL, dtype: torch.dtype):
    """One token for each value, the largest residual is that of the largest value."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(64, 1024, 1)
    wide = every.float().numpy()
    counts, prior = np.full(64, 1024), np.zeros((64, 1024), np.float32)
    options = Settings(1, 1024, 1024.0)
    expected = reference.token_select(wide, prior, counts, 1, 1024, 1024.0)
    assert run(library, every, prior, counts, options).tolist() == expected.tolist()


def test_a_subnormal_half_has_its_place_among_the_normal_ones(library: ctypes.CDLL):
    """Two of 1023 steps are longer than one of 1100, and shorter than one of 1500."""
    step = 2.0**-24
    for normal, expected in ((1100, 0), (1500, 1)):
        features = torch.tensor([[[1023 * step, 1023 * step], [normal * step, 0.0]]], dtype=torch.float16)
        kept = run(library, features, np.zeros((1, 2)), np.array([2]), Settings(1, 2))
        assert kept.tolist() == [[expected]]


def test_what_is_not_an_images_own_is_never_looked_at(library: ctypes.CDLL):
    features, prior, counts = padded([image(0, 60, 24), image(1, 21, 24)])
    batch, options = (torch.from_numpy(features), prior), Settings(1, 2)
    expected = run(library, *batch, counts, options).tolist()
    outside = np.arange(60) >= counts[:, None]
    for garbage in (0.0, 1e30):
        features[outside], prior[outside] = garbage, garbage
        assert run(library, *batch, counts, options).tolist() == expected
    # Counts that cannot be are cut to what can.
    assert run(library, *batch, np.array([99, -3]), options).tolist() == [expected[0], [-1] * 30]


# ── Sizes and limits ─────────────────────────────────────────────────────────


@REPEATABLE
@given(
    st.integers(1, 20_000),
    st.integers(1, 8192),
    st.tuples(st.integers(1, 1000), st.integers(1, 1000)).map(sorted),
    st.one_of(st.sampled_from([1.0, 2.0, 8.0, 1.25]), st.floats(1, 2.0**100, width=32)),
)
def test_scratch_is_at_least_what_is_needed(tokens: int, width: int, share: list[int], factor: float):
    options = Settings(*share, factor)
    keep = keep_count(tokens, *share)
    pool = pool_count(tokens, keep, factor)
    exact = (min(keep, width) + 3) * pool + keep
    assert kernel.keep_size(tokens, options) == keep
    wanted = kernel.work_size(tokens, width, options)
    assert exact <= wanted
    if factor * 1024 == int(factor * 1024):
        assert exact == wanted
    else:
        assert wanted - exact <= (min(keep, width) + 3) * (1 + keep / 1024)


def test_shared_memory_is_enough_for_known_encoders():
    """LLaVA-1.5, LLaVA-NeXT, and Qwen's 3584-wide merged tokens at any share fit; what does not says why."""
    assert kernel.shared_bytes(576, 1024, Settings(1, 9)) == 4 * (1024 + 64 + 2 + 2 * 33 * 16)
    for tokens, width, share in ((576, 1024, (1, 1)), (2880, 1024, (1, 1)), (16384, 3584, (1, 1))):
        assert kernel.refusal(tokens, width, Settings(*share)) is None
    assert kernel.refusal(6000, 5615, Settings(1, 1)) is None
    reason = kernel.refusal(6000, 5616, Settings(1, 1))
    assert reason is not None
    assert "49160 bytes of shared memory, a block has 49152" in reason


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"keep_numerator": 0}, "keep_ratio 0/2 is outside (0, 1]"),
        ({"keep_numerator": 3}, "keep_ratio 3/2 is outside (0, 1]"),
        ({"keep_numerator": 2**30, "keep_denominator": 2**31}, "over 31 bits"),
        ({"pool_factor": 0.5}, "pool_factor is 0.5, outside 1 to"),
        ({"pool_factor": math.inf}, "pool_factor is inf, outside 1 to 3.402823e+38"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"exponent": -0.5}, "exponent is -0.5"),
        ({"epsilon": 1e39}, "epsilon is 1e+39"),
    ],
)
def test_settings_the_kernel_cannot_take_are_refused(changed: dict[str, float], reason: str):
    options = Settings(**{"keep_numerator": 1, "keep_denominator": 2, **changed})
    assert reason in (kernel.refusal(100, 64, options) or "")


def test_images_too_large_for_32_bits_are_refused():
    assert "16777216 tokens in one image" in (kernel.refusal(2**24, 8, Settings(1, 2)) or "")
    assert "floats of scratch, over 2147483647" in (kernel.refusal(3_000_000, 1024, Settings(1, 1)) or "")


def test_scalars_are_32_bit_and_floats_keep_their_bits():
    values = kernel.scalars(576, 1024, Settings(1, 9, 2.0, 0.7, 0.5, 1e-5))
    assert values[:6] == [576, 1024, 64, (64 + 3) * 128 + 64, 1, 9]
    floats = struct.unpack("<4f", struct.pack("<4i", *values[6:]))
    assert floats == tuple(np.array([2.0, 0.7, 0.5, 1e-5], np.float32).tolist())


# ── The PTX ──────────────────────────────────────────────────────────────────

ARCHITECTURES = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)


def test_the_ptx_was_made_of_this_source():
    """Where this fails: python engines/token_select/compile.py NVRTC_FOLDER."""
    assert kernel.read_ptx().startswith(f"// source sha256: {kernel.source_hash()}\n")


def test_the_ptx_is_for_old_drivers_and_every_gpu_and_has_the_three_kernels():
    text = kernel.read_ptx()
    assert re.findall(r"^\.(version|target) (.+)$", text, re.MULTILINE) == [("version", "7.0"), ("target", "sm_75")]
    entries = dict(re.findall(r"\.entry (\w+)\((.*?)\)", text, re.DOTALL))
    assert set(entries) == set(kernel.ENTRY_POINTS.values())
    scalars = len(kernel.scalars(4, 4, Settings(1, 2)))
    for parameters in entries.values():
        kinds = re.findall(r"\.param \.(\w+)", parameters)
        assert kinds == ["u64"] * 3 + ["u32"] * scalars + ["u64"] * 2
    assert set(re.findall(r"\.maxntid (\d+)", text)) == {str(kernel.THREADS)}


@pytest.mark.tensorrt
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_ptx_assembles_without_spills(tmp_path: Path, architecture: int):
    ptxas = unpacked("ptxas", "nvidia-cuda-nvcc")
    ptxas.chmod(0o755)
    output = tmp_path / "kernel.cubin"
    command = [str(ptxas), "-v", f"-arch=sm_{architecture}", str(shipped_folder("token_select") / "token_select.ptx")]
    result = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True, check=True)
    assert output.stat().st_size > 0
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert spills == [("0", "0", "0")] * 3
    registers = [int(value) for value in re.findall(r"Used (\d+) registers", result.stderr)]
    assert len(registers) == 3
    assert max(registers) * kernel.THREADS <= 65536
    assert " smem" not in result.stderr  # all of it is dynamic


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that makes the PTX; it leaves no compiled file beside itself, where a wheel would take it along."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_file_location("compile_kernel", REPOSITORY / "engines/token_select/compile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.tensorrt
def test_the_source_compiles_to_the_shipped_ptx(script: ModuleType):
    nvrtc = script.load_nvrtc(unpacked("libnvrtc.so.13", "nvidia-cuda-nvrtc").parent)
    ptx = script.compile_ptx(nvrtc, (shipped_folder("token_select") / "token_select.cuh").read_bytes())
    _, shipped = kernel.read_ptx().split("\n", 1)
    if "V13.5." not in ptx:
        pytest.skip("the shipped PTX is NVRTC 13.5's, another one is unpacked")
    assert script.lowered(ptx) == shipped
    with pytest.raises(RuntimeError, match="nvrtcCompileProgram failed with status 6"):
        script.compile_ptx(nvrtc, b"no CUDA")


@pytest.mark.parametrize("text", ["", ".version 9.5\n.target sm_90\n", ".version 9.5\n.version 9.5\n.target sm_75\n"])
def test_only_the_ptx_that_was_asked_for_is_lowered(script: ModuleType, text: str):
    with pytest.raises(RuntimeError, match="not the PTX that NVRTC was asked for"):
        script.lowered(text)


def test_the_script_says_what_it_needs(script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert script.main([]) == 2
    assert script.main([str(tmp_path)]) == 1
    assert "unpack nvidia-cuda-nvrtc there" in capfd.readouterr().err
