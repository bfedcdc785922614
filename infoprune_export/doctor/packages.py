"""The distributions the toolkit uses, and the commands that install them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A distribution the toolkit uses. Without an extra it is required."""

    name: str
    minimum: str = ""
    extra: str = ""
    module: str = ""
    """Imported to see that it loads. Empty for backends, which have their own check, and for tools run as commands."""
    aliases: tuple[str, ...] = ()
    """Distributions that install the same thing under another name."""
    below: str = ""

    @property
    def supported(self) -> str:
        """The supported range as pip writes it; empty when any version does."""
        bounds = ((">=", self.minimum), ("<", self.below))
        return ",".join(sign + bound for sign, bound in bounds if bound)

    @property
    def requirement(self) -> str:
        return self.name + self.supported

    @property
    def install(self) -> str:
        return f"pip install 'infoprune-export[{self.extra}]'" if self.extra else f"pip install '{self.requirement}'"

    @property
    def reinstall(self) -> str:
        # Its own files first, then whatever the fresh copy depends on; the other order can leave the latter undone.
        return f"pip install --force-reinstall --no-deps '{self.requirement}' && pip install '{self.requirement}'"


ONNXRUNTIME = Package("onnxruntime", "1.22", extra="cpu")
ONNXRUNTIME_GPU = Package("onnxruntime-gpu", "1.22", extra="gpu")
TENSORRT = Package("tensorrt", "10.3", extra="tensorrt", aliases=("tensorrt-cu13", "tensorrt-cu12"), below="12")
TORCH = Package("torch", "2.11", module="torch")

PACKAGES = (
    Package("numpy", "1.26", module="numpy"),
    TORCH,
    Package("transformers", "5.17", module="transformers"),
    Package("tokenizers", "0.21", module="tokenizers"),
    Package("safetensors", "0.4.3", module="safetensors"),
    Package("accelerate", "1.0", module="accelerate"),
    Package("optimum", "2.0", module="optimum.version"),
    Package("requests", "2.31", module="requests"),
    Package("onnx", "1.19", module="onnx"),
    Package("onnxscript", "0.6", module="onnxscript"),
    Package("onnx-ir", "0.1.9", module="onnx_ir"),
    Package("pillow", "10.1", module="PIL.Image"),
    Package("matplotlib", "3.9", module="matplotlib"),
    Package("jinja2", "3.1", module="jinja2"),
    Package("pyyaml", "6.0", module="yaml"),
    Package("pydantic", "2.10", module="pydantic"),
    Package("filelock", "3.12", module="filelock"),
    Package("click", "8.1", module="click"),
    Package("rich", "13.7", module="rich"),
    Package("typing-extensions", "4.12", module="typing_extensions"),
    ONNXRUNTIME,
    ONNXRUNTIME_GPU,
    TENSORRT,
    Package("datasets", "3", extra="hub"),
    Package("lmms-eval", "0.7", extra="lmms", below="0.8"),
    Package("openvino", "2025.0", extra="openvino"),
    Package("ray", "2.40", extra="ray"),
    Package("pdoc", "15", extra="docs"),
    Package("hatchling", "1.25", extra="dev"),
    Package("pytest", "8.0", extra="dev"),
    Package("pytest-cov", "5.0", extra="dev"),
    Package("pytest-xdist", "3.6", extra="dev"),
    Package("hypothesis", "6.100", extra="dev"),
    Package("ruff", "0.9", extra="dev"),
    Package("mypy", "1.15", extra="dev"),
    Package("scipy", "1.11", extra="dev"),
    Package("types-pyyaml", extra="dev"),
)
"""What pyproject.toml declares, with what it cannot say; a test holds the two together."""
