"""The kernel launched on PyTorch's tensors: the arguments by a driver that runs it on the host, the rest on a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import shutil
import subprocess

import numpy as np
import pytest
import torch
from selections import KINDS, image, padded, vectors

from infoprune_export.shipped import shipped_folder
from infoprune_export.tokens import cuda, kernel
from infoprune_export.tokens.kernel import Settings
from infoprune_export.tokens.reference import replay
from infoprune_export.tokens.select import token_select

# The three calls that are made of the driver, over the kernel's source compiled for the host.
DRIVER = """
#include <string.h>
#include <vector>
#define TOKEN_SELECT_HOST
#include "{source}"
extern "C" int cuModuleLoadData(void **module, const char *ptx) {{
  *module = (void *)16;
  return strstr(ptx, ".version 7.0") && strstr(ptx, ".target sm_75") ? 0 : 218;
}}
extern "C" int cuModuleGetFunction(void **function, void *module, const char *name) {{
  const char *names[] = {{"token_select_f32", "token_select_f16", "token_select_bf16"}};
  for (size_t kind = 0; kind < 3; ++kind)
    if (module == (void *)16 && !strcmp(name, names[kind])) return *function = (void *)(kind + 1), 0;
  return 500;
}}
extern "C" int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                              unsigned threads_z, unsigned shared, void *stream, void **a, void *extra) {{
  if (y != 1 || z != 1 || threads_y != 1 || threads_z != 1 || threads > 512 || shared > 49152) return 1;
  if (stream || extra) return 1;
  std::vector<float> scratch(shared / 4);
  const auto at = [&](int place) {{ return *static_cast<void **>(a[place]); }};
  const auto number = [&](int place) {{ return *static_cast<int *>(a[place]); }};
  const long long used = token_select_host(
      (size_t)function - 1, x, threads, 0, at(0), (float *)at(1), (int *)at(2), number(3), number(4), number(5),
      number(6), number(7), number(8), number(9), number(10), number(11), number(12), (int *)at(13), (float *)at(14),
      scratch.data());
  return used <= number(6) ? 0 : 700;
}}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    folder = tmp_path_factory.mktemp("driver")
    source, library = folder / "driver.cpp", folder / "driver.so"
    source.write_text(DRIVER.format(source=shipped_folder("token_select") / "token_select.cuh"))
    subprocess.run([compiler, "-std=c++17", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return cuda._driver(str(library))


def picture(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(map(torch.from_numpy, padded([image(seed, 90, 40), image(seed + 1, 33, 40), image(seed + 2, 1, 40)])))


def values(settings: Settings) -> tuple[float, ...]:
    return dataclasses.astuple(settings)


# ── On any machine ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [Settings(1, 9), Settings(1, 2, 1.25, 0.05, 4.0, 0.1), Settings(1, 1, 1e9)], ids=["1/9", "other", "all"]
)
def test_a_launch_passes_what_the_kernel_takes(driver: ctypes.CDLL, dtype: torch.dtype, settings: Settings):
    features, prior, counts = picture()
    functions = cuda.load(driver, kernel.read_ptx())
    assert functions is not None
    kept = cuda.launch(driver, functions, 0, features.to(dtype), prior, counts, settings)
    expected = token_select(features.to(dtype), prior, counts, *values(settings))
    assert kept.dtype == torch.int64
    assert torch.equal(kept, expected)


def test_a_launch_takes_any_layout_and_leaves_its_inputs_alone(driver: ctypes.CDLL):
    features, prior, counts = picture()
    functions = cuda.load(driver, kernel.read_ptx())
    strided = features.mT.contiguous().mT, prior.half().repeat(1, 2)[:, :90], counts.repeat_interleave(2)[::2]
    assert not any(tensor.is_contiguous() for tensor in strided)
    before = [tensor.clone() for tensor in strided]
    kept = cuda.launch(driver, functions, 0, *strided, Settings(1, 3))
    assert torch.equal(kept, token_select(features, prior.half(), counts, 1, 3))
    for tensor, old in zip(strided, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), old.nan_to_num())


def test_a_driver_that_refuses_the_ptx_leaves_the_choice_to_pytorch(driver: ctypes.CDLL):
    assert cuda.load(driver, kernel.read_ptx().replace(".target sm_75", ".target sm_999")) is None


def test_a_refused_launch_is_an_error(driver: ctypes.CDLL):
    functions = cuda.load(driver, kernel.read_ptx())
    with pytest.raises(RuntimeError, match="refused the launch of token_select with status 1"):
        cuda.launch(driver, functions, 8, *picture(), Settings(1, 3))
    with pytest.raises(RuntimeError, match="status 500"):
        cuda._check(driver.cuModuleGetFunction(ctypes.byref(ctypes.c_void_p()), None, b"token_select_f32"))


@pytest.mark.parametrize(
    "case",
    ["float64 features", "float64 prior", "no images", "no tokens", "no dimensions", "too wide", "a share over 1"],
)
def test_what_the_kernel_cannot_do_is_left_to_pytorch(case: str):
    features, prior, counts = picture()
    settings = Settings(1, 2)
    if case == "float64 features":
        features = features.double()
    elif case == "float64 prior":
        prior = prior.double()
    elif case == "no images":
        features, prior, counts = features[:0], prior[:0], counts[:0]
    elif case == "no tokens":
        features, prior, counts = features[:, :0], prior[:, :0], 0 * counts
    elif case == "no dimensions":
        features = features[..., :0]
    elif case == "too wide":
        features = features.repeat(1, 1, 300)
    else:
        settings = Settings(3, 2)
    assert cuda.token_select(features, prior, counts, settings) is None


def test_gpus_of_another_maker_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch):
    """Their tensors are on a device called cuda too."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert cuda.token_select(*picture(), Settings(1, 2)) is None


# ── On a GPU ─────────────────────────────────────────────────────────────────


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Types of the features that the kernel was launched with."""
    made, launch = [], cuda.launch

    def noted(*arguments):
        made.append(arguments[3].dtype)
        return launch(*arguments)

    monkeypatch.setattr(cuda, "launch", noted)
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("share", [(1, 9), (1, 2), (1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_equals_pytorch_on_the_host(launches: list[torch.dtype], dtype, share, kind):
    rng = np.random.default_rng(5)
    x = np.stack([vectors(kind, rng, 700, 96) for _ in range(4)])
    features = torch.from_numpy((x / np.abs(x).max()).astype(np.float32)).to(dtype)
    prior, counts = torch.from_numpy(rng.random((4, 700), np.float32)), torch.tensor([700, 255, 1, 0])
    expected = token_select(features, prior, counts, *share, 2.0)
    kept = token_select(features.cuda(), prior.cuda(), counts.cuda(), *share, 2.0).cpu()
    assert launches == [dtype]
    for row, count in enumerate(counts.tolist()):
        own = kept[row][kept[row] >= 0].numpy()
        assert len(own) == math.ceil(count * share[0] / share[1])
        if not torch.equal(kept[row], expected[row]):
            assert replay(features[row, :count].float().numpy(), prior[row, :count].numpy(), own, 2.0) <= 1e-2


@pytest.mark.gpu
def test_the_kernel_runs_on_the_current_stream_and_pytorch_takes_the_rest(launches: list[torch.dtype]):
    features, prior, counts = (tensor.cuda() for tensor in picture())
    expected = token_select(*picture(), 1, 3)
    with torch.cuda.stream(torch.cuda.Stream()):
        kept = token_select(features, prior, counts, 1, 3)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(kept.cpu(), expected)
    assert torch.equal(token_select(features.double(), prior, counts, 1, 3).cpu(), expected)
    assert launches == [torch.float32]
