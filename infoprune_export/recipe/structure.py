"""Sections about structure: heads, feed-forward networks and what is fitted behind them (paper A).

Of the vision encoder, and under `LanguageSpec` of the language model.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from infoprune_export.recipe.base import Spec

HeadMethod = Literal[
    "obs",
    "budgeted",
    "paper",
    "hard_concrete",
    "random",
    "magnitude",
    "activation",
    "michel",
    "michel_iterative",
    "erank_drop",
    "yopo_style",
    "none",
]


class HeadsSpec(Spec):
    """Attention-head pruning (paper A, section 4.1).

    The default, ``budgeted``, is the one that stays close to the best at every share on both testbeds. ``obs`` takes
    the heads whose removal costs least after the rest has compensated (`heads.obs`): one pass, and damages that can be
    compared with those of neurons, which one budget for both needs.

    Trained gates: ``paper`` is its objective to the letter, ``task + alpha |zeta|_1 + beta eRank + gamma KS``, and a
    threshold. ``budgeted`` repairs what was measured to be wrong with it: the penalty is on the gates' sum instead of
    |zeta| (whose minimum is the threshold itself), KS becomes a sorted Wasserstein-1 distance (KS has no gradient),
    heads are chosen by budget, survivors get gate 1, and the output projection is refitted. ``hard_concrete`` trains
    stochastic gates that meet the budget by themselves.

    The others score heads without training too, see `heads.criteria`. All but ``paper`` share budget and refit.
    """

    method: HeadMethod = "budgeted"
    """``obs`` where a recipe with a joint budget names none."""
    remove: float = Field(0.5, ge=0, lt=1)
    """Fraction of all heads that a budget removes."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """A threshold keeps a head whose gate is at least this (z)."""
    choose: Literal["auto", "threshold", "budget"] = "auto"
    """``auto`` is the method's own: threshold for ``paper``, budget for all others."""
    survivors: Literal["one", "gate"] = "one"
    """``gate`` multiplies a trained gate's value into the head's columns of the output projection."""
    task_weight: float = Field(1.0, ge=0)
    """Weight of the task loss. A term of weight 0 is not computed."""
    alpha: float = Field(0.01, ge=0)
    """Weight of the penalty on gates."""
    beta: float = Field(0.01, ge=0)
    """Weight of the effective rank."""
    gamma: float = Field(0.1, ge=0)
    """Weight of the distance of spectra."""
    penalty: Literal["auto", "l1", "gates"] = "auto"
    """``l1``: sum of |zeta|, the own of ``paper``. ``gates``: sum of the gates, the own of ``budgeted``."""
    distance: Literal["auto", "ks", "wasserstein"] = "auto"
    """``ks`` is the own of ``paper``, ``wasserstein`` of ``budgeted``."""
    spectral_blocks: int = Field(8, ge=1)
    """Blocks whose spectral terms each step computes anew, in turn; the others keep their last gradient."""
    learning_rate: float = Field(1e-2, gt=0)
    """Of trained gates; the paper's, and so the next."""
    epochs: int = Field(7, ge=1)
    """Passes over the calibration images."""
    batch_size: int = Field(32, ge=1)
    """Images per step, all processes together."""
    questions_per_image: int = Field(1, ge=1)
    """Drawn anew from the image's questions at every epoch."""
    initial_zeta: float = 3.0
    """The paper says only "a large value"; sigmoid(3) = .95."""
    rounds: int = Field(8, ge=1)
    """Rounds in which ``michel_iterative`` removes heads."""
    processes: int = Field(1, ge=1, le=64)
    """Processes that share out each training batch, one GPU each, or all on the CPU."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast of the model while gates are trained; the gates stay in fp32, spectra in float64."""
    gradient_checkpointing: bool = False
    """Trade time for memory: activations of every block and language layer are computed again in the backward pass."""
    checkpoint_steps: int = Field(50, ge=1)
    """Training state is written after so many steps, and after every epoch."""

    @property
    def trains_gates(self) -> bool:
        return self.method in ("budgeted", "paper", "hard_concrete")

    def resolved(self) -> HeadsSpec:
        """The same with the method's own choice in place of every ``auto``."""
        paper = self.method == "paper"
        own = {
            "choose": "threshold" if paper else "budget",
            "penalty": "l1" if paper else "gates",
            "distance": "ks" if paper else "wasserstein",
        }
        return self.model_copy(update={name: own[name] for name in own if getattr(self, name) == "auto"})

    @model_validator(mode="after")
    def _fits_together(self) -> HeadsSpec:
        sigmoid = self.method in ("budgeted", "paper")
        if not sigmoid:
            for name in ("penalty", "distance"):
                if getattr(self, name) != "auto":
                    raise ValueError(
                        f"{name} belongs to the methods budgeted and paper, not {self.method}; leave it out"
                    )
            if self.choose == "threshold":
                raise ValueError(
                    f"choose = 'threshold' needs the gates of budgeted or paper, {self.method} has none to compare; "
                    "use budget"
                )
        if self.survivors == "gate" and not self.trains_gates:
            raise ValueError(
                f"survivors = 'gate' needs trained gates, {self.method} has none; use one, or budgeted, paper or "
                "hard_concrete"
            )
        if self.method == "hard_concrete" and not self.task_weight:
            raise ValueError("task_weight = 0 leaves hard_concrete nothing to tell heads apart by; make it positive")
        slope = self.task_weight or self.alpha or self.beta or (self.gamma and self.resolved().distance != "ks")
        if sigmoid and not slope:
            raise ValueError(
                "no term of the objective has a gradient (ks has none); make task_weight, alpha or beta positive"
            )
        return self


FfnMethod = Literal[
    "obs",
    "bypass",
    "whitened_svd",
    "rrr",
    "taylor",
    "paper",
    "prunenet",
    "activation",
    "magnitude",
    "random",
    "none",
]


class FfnSpec(Spec):
    """Feed-forward compression (paper A, section 4.2).

    Neurons removed: ``obs`` by optimal-brain-surgeon cost in the output-gradient metric, widths from one budget over
    all blocks; ``bypass`` the same, with part of the budget for a linear path around the activation. One width for all
    blocks, as their authors have it: ``prunenet`` (a policy trained on singular spectra), ``activation`` (root mean
    square times column norm), ``magnitude`` (row norm times column norm) and their control ``random``.

    Matrices factored, the activation kept: ``whitened_svd`` (SVD-LLM).

    Replaced by a linear map of low rank: ``paper``, the truncated SVD of W2 W1 (Algorithm 2); ``taylor``, the Jacobian
    at the mean input, which its equation 7 asks for; ``rrr``, reduced-rank regression, the best linear map there is. A
    rank above half the features costs more than one dense matrix; it is allowed, as the paper's own ranks are above it.
    """

    method: FfnMethod = "obs"
    """See above; ``none`` leaves the FFNs as they are."""
    keep_macs: float = Field(0.5, gt=0, le=1)
    """Fraction of all FFN multiply-accumulates that is kept; ``paper`` and ``taylor`` go by `epsilon` unless told."""
    round_to: int = Field(64, ge=1)
    """Widths are multiples of this; GEMM kernels waste the rest of a tile."""
    rank_round_to: int = Field(8, ge=1)
    """Ranks from `keep_macs` are multiples of this, the least that half-precision kernels want."""
    rank_by: Literal["epsilon", "keep_macs"] = "epsilon"
    """Where ``paper`` and ``taylor`` have their ranks from: Theorem 3, or the budget as the other methods."""
    epsilon: float = Field(0.05, gt=0, lt=1)
    """``paper``, ``taylor``: keep the fewest singular values with at least (1 - epsilon^2) of the squared sum."""
    bypass_rank: int = Field(8, ge=1)
    """Channels of the path of ``bypass``: one costs as much as a neuron (two thirds of one with a gate)."""
    prunenet_episodes: int = Field(20, ge=1)
    """As the authors have it, and so the next two."""
    prunenet_rate: float = Field(1e-3, gt=0)
    """Learning rate of the policy."""
    prunenet_discount: float = Field(0.99, gt=0, le=1)
    """Of the reward, per block."""
    prunenet_sample: bool = False
    """Draw the final neurons from the policy, as the authors do, instead of taking the likeliest."""


class LanguageSpec(Spec):
    """Head and FFN pruning of the language model, as of the vision encoder: what paper A leaves to future work.

    ``obs`` takes what costs least by optimal brain surgeon in the output-gradient metric, under one budget over all
    layers; ``random`` is its control. Either is refitted as `RefitSpec` says. A layer keeps at least one key-value head
    with one query head, and `round_to` neurons.
    """

    method: Literal["none", "obs", "random"] = "none"
    """See above."""
    remove_heads: float = Field(0.25, ge=0, lt=1)
    """Fraction of the attention's multiply-accumulates (q, k, v, o) that goes. Plain heads count one each; of grouped
    queries either whole key-value heads with their queries go, or equally many queries of each."""
    keep_macs: float = Field(0.75, gt=0, le=1)
    """Fraction of all FFN multiply-accumulates that is kept."""
    round_to: int = Field(64, ge=1)
    """FFN widths are multiples of this."""


class RecoverySpec(Spec):
    """A short fine-tune of what is left of the vision encoder; validation reports it apart from what it began with."""

    method: Literal["none", "distill"] = "none"
    """``distill``: the blocks' parameters learn to give the language model the original's visual tokens. No labels:
    on the testbed the answers' loss beside it took twice the time and gained nothing."""
    epochs: int = Field(10, ge=1)
    """On the testbed half a minute of one core for 448 images. Three epochs of 2,000 images take 40 seconds and bring
    fresh images closer to the original."""
    learning_rate: float = Field(3e-3, gt=0)
    """The better of 1e-3 and 3e-3 on the testbed's LLaVA, 128 channels wide; a wide tower may want less."""
    batch_size: int = Field(32, ge=1)
    """Images per step."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises, before it falls to 0 by half a cosine."""
    stream_weight: float = Field(1.0, ge=0)
    """Weight of the distance of the residual streams behind the blocks. On the testbed it brings fresh images 4 to 8%
    closer to the original at no cost in time. 0 leaves it out."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast of both towers; parameters and AdamW's moments stay in fp32."""
    gradient_checkpointing: bool = False
    """Trade time for memory: activations of every block are computed again in the backward pass."""
    checkpoint_steps: int = Field(50, ge=1)
    """Training state is written after so many steps, and after every epoch."""


class BudgetSpec(Spec):
    """One budget for heads and neurons together, instead of `HeadsSpec.remove` and `FfnSpec.keep_macs`."""

    by: Literal["none", "flops", "latency"] = "none"
    """What the budget counts: ``flops`` as torch counts them, or ``latency`` as measured part by part in ONNX Runtime,
    with the target's providers and the bench section's threads."""
    images: int = Field(1, ge=1)
    """Calibration images in the call that is measured; small matrices pay more for everything that is no product."""
    of: Literal["both", "heads", "ffn"] = "both"
    """What may be made smaller."""
    speed_up: float = Field(2.0, gt=1)
    """Cost of the whole vision encoder, without token selection, over what it shall cost."""


class RefitSpec(Spec):
    """Ridge least squares that fits output projections (heads) and down projections (FFN) to the original model."""

    enabled: bool = True
    """Without it what is kept stays exactly what it was."""
    ridge: float = Field(0.03, gt=0)
    """Added to the normal matrix's diagonal, relative to its mean. On the testbed .001 to .1 are equal within the
    standard error at 448 images; with few images the larger one is safer."""
