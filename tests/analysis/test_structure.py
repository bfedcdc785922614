"""Structural analyses against towers and numbers small enough to do by hand."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex

from infoprune_export.analysis import structure, structure_figures
from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.obs import eliminate_neurons
from infoprune_export.heads.obs import eliminate_heads, scores_of
from infoprune_export.models import tower_of
from infoprune_export.models.calibration import TaskLoss, inputs_of
from infoprune_export.models.elimination import Elimination
from infoprune_export.models.vlm import VLM
from infoprune_export.pipeline import load_vlm
from infoprune_export.recipe import ModelSpec
from tests import families

SVG = "{http://www.w3.org/2000/svg}"


def quiet(title: str, total: int) -> Any:
    return lambda amount: None


@pytest.fixture(scope="module")
def qwen_processor() -> Any:
    return load_vlm(ModelSpec(name_or_path="testbed/tiny-qwen2.5-vl"), "cpu").processor


# ── Attention entropy ────────────────────────────────────────────────────────


@torch.no_grad()
def test_entropy_is_that_of_hugging_faces_own_attention(random_vlm, scene_split):
    samples = scene_split.validation[:3]
    for block in random_vlm.tower.blocks:  # random weights alone would spread all heads alike
        for projection in (block.module.self_attn.q_proj, block.module.self_attn.k_proj):
            projection.weight.mul_(15.0)
    seen: list[int] = []
    actual = structure.attention_entropy(random_vlm, samples, seen.append)
    assert seen == [1, 1, 1]
    vision = random_vlm.model.model.vision_tower
    vision.set_attn_implementation("eager")
    pixels = inputs_of(random_vlm, samples)["pixel_values"]
    expected = []
    for attention in vision(pixels, output_attentions=True).attentions[: len(actual)]:
        p = attention.double().numpy()
        assert p.shape[-1] == 65
        logs = np.log(p, out=np.zeros_like(p), where=p > 0)
        expected.append((-(p * logs).sum(-1) / np.log(65)).mean(axis=(0, 2)))
    assert actual.dtype == torch.float64
    assert np.ptp(expected) > 0.02
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen2-vl"])
def test_attention_to_all_keys_of_a_window_alike_has_entropy_one(family, qwen_processor, scene_split):
    model = families.build(family)
    vlm = VLM(model, qwen_processor, tower_of(model))
    blocks = vlm.tower.blocks
    assert {block.windowed for block in blocks} == ({True, False} if family == "qwen2.5-vl" else {False})
    spread = structure.attention_entropy(vlm, scene_split.validation[:2])
    assert spread.shape == (len(blocks), blocks[0].num_heads)
    assert (spread < 1 - 1e-4).all()
    width = blocks[0].head_dim
    for block in blocks:  # queries of head 0
        fused = block.module.attn.qkv
        fused.weight[:width], fused.bias[:width] = 0.0, 0.0
    spread = structure.attention_entropy(vlm, scene_split.validation[:2])
    torch.testing.assert_close(spread[:, 0], torch.ones(len(blocks), dtype=torch.float64), atol=1e-6, rtol=0)
    assert (spread[:, 1:] < 1 - 1e-4).all()


def test_importance_is_the_negative_entropy_between_its_extremes():
    entropy = torch.tensor([[0.2, 0.8], [0.5, 0.35]], dtype=torch.float64)
    cheap_where_wide = torch.tensor([[4.0, 1.0], [2.0, 3.0]], dtype=torch.float64)
    found = structure.compare_heads(entropy, cheap_where_wide)
    np.testing.assert_allclose(found["importance"], [[1.0, 0.0], [0.5, 0.75]])
    assert found["entropy"] == entropy.tolist()
    assert found["damage"] == cheap_where_wide.tolist()
    assert found["lower_half_shared"] == 1.0
    assert structure.compare_heads(entropy, 5 - cheap_where_wide)["lower_half_shared"] == 0.0
    assert structure.compare_heads(entropy, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))["lower_half_shared"] == 0.5


def test_heads_of_one_entropy_matter_nothing():
    found = structure.compare_heads(torch.full((2, 2), 0.3), torch.ones(2, 2))
    assert found["importance"] == [[0.0, 0.0], [0.0, 0.0]]


# ── Feed-forward networks ────────────────────────────────────────────────────


def test_a_row_is_dense_from_five_percent_of_the_dimension_on():
    matrix = torch.tensor([[0.5, -0.5], [0.99, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    assert structure.row_density(matrix, 20) == 0.5
    assert structure.row_density(matrix, 21) == 0.0
    assert structure.row_density(matrix, 1) == 0.75


@torch.no_grad()
def test_densities_are_of_input_features_and_neurons(random_vlm):
    block = random_vlm.tower.blocks[1]
    first, second = block.ffn_in.weight, block.ffn_out.weight  # [128, 32] and [32, 128]; 5% of 32 is 1.6
    first.zero_(), second.zero_()
    first[:, 3] = 1.7 / 128  # feature 3 reaches all neurons, 1.7 in all
    first[0, 4:8] = 1.0  # four features reach neuron 0 only
    second[5, :32] = -4.0  # 32 neurons are read
    found = structure.densities(random_vlm.tower.blocks)
    # Feature 3 gives 32 * 4 * 1.7 / 128 = 1.7, features 4 to 7 give 4.
    assert (found["W1"][1], found["W2"][1], found["W1W2"][1]) == (1 / 32, 32 / 128, 5 / 32)
    assert set(found) == {"W1", "W2", "W1W2"}
    assert all(len(values) == 5 for values in found.values())


@torch.no_grad()
def test_of_a_gated_ffn_the_projection_that_is_multiplied_counts():
    model = families.build("qwen2.5-vl")
    blocks = tower_of(model).blocks
    blocks[0].ffn_projections["ffn_gate"].weight.zero_()
    before = structure.densities(blocks)["W1"][0]
    blocks[0].ffn_projections["ffn_in"].weight.zero_()
    assert before > 0
    assert structure.densities(blocks)["W1"][0] == 0.0
    assert set(structure.retained_ranks(blocks, [0.1])) == {"features", "break_even", "by_epsilon"}


@torch.no_grad()
def test_ranks_are_read_from_the_singular_values(random_vlm):
    block = random_vlm.tower.blocks[2]
    block.ffn_in.weight.zero_(), block.ffn_out.weight.zero_()
    # 10, 1, .1, .01: what is behind the first k has .1, .01, .001 of the norm (a little more, each time).
    block.ffn_in.weight[:4, :4] = torch.diag(torch.tensor([10.0, 1.0, 0.1, 0.01]))
    block.ffn_out.weight[torch.arange(32), torch.arange(32)] = 1.0
    found = structure.retained_ranks(random_vlm.tower.blocks, [0.2, 0.05, 0.005, 0.0005])
    assert {epsilon: ranks[2] for epsilon, ranks in found["by_epsilon"].items()} == {
        "0.2": 1,
        "0.05": 2,
        "0.005": 3,
        "0.0005": 4,
    }
    assert (found["features"], found["break_even"]) == (32, 16.0)
    assert all(len(ranks) == 5 for ranks in found["by_epsilon"].values())


# ── Damage ───────────────────────────────────────────────────────────────────


def test_damage_curves_count_from_one_removed_to_all():
    few = Elimination(torch.tensor([2, 0, 1]), torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=torch.float64))
    many = Elimination(torch.arange(640), torch.arange(641, dtype=torch.float64).square())
    assert structure.damage_curves([few])[0] == {"removed": [1, 2, 3], "damage": [1.0, 3.0, 7.0]}
    (row,) = structure.damage_curves([many])
    assert row["removed"] == list(range(10, 641, 10))
    assert row["damage"] == [count**2 for count in row["removed"]]


def test_damage_is_what_budgets_are_allocated_by(random_vlm, scene_split):
    before = {name: value.clone() for name, value in random_vlm.model.state_dict().items()}
    seen: dict[str, list[int]] = {}

    def track(title: str, total: int) -> Any:
        seen[title] = [total, 0]
        return lambda amount: seen[title].__setitem__(1, seen[title][1] + amount)

    results, drawn = structure.analyse_structure(random_vlm, scene_split, 2, 7, structure.WHAT, track)
    assert all(torch.equal(value, before[name]) for name, value in random_vlm.model.state_dict().items())
    assert list(drawn) == list(results)
    assert set(results) == set(structure.WHAT)
    assert len(seen) == 3
    assert all(total == done > 0 for total, done in seen.values())
    loss = TaskLoss(True, random_vlm.tower)
    heads = eliminate_heads(random_vlm, scene_split.calibration, loss, 7)
    neurons = eliminate_neurons(random_vlm, scene_split.calibration, loss, 7)
    assert results["damage"]["images"] == 24
    for row, elimination in zip(results["damage"]["heads"], heads, strict=True):
        assert row["damage"] == pytest.approx(elimination.cost[1:].tolist(), rel=1e-4)
    for row, elimination in zip(results["damage"]["neurons"], neurons, strict=True):
        assert row["removed"] == list(range(2, 129, 2))
        assert row["damage"] == pytest.approx(elimination.cost[2::2].tolist(), rel=1e-4)
    np.testing.assert_allclose(results["heads"]["damage"], scores_of(heads), rtol=1e-4)
    entropy = structure.attention_entropy(random_vlm, scene_split.validation[:2])
    np.testing.assert_allclose(results["heads"]["entropy"], entropy)


def test_only_what_is_asked_for_is_computed(random_vlm, scene_split):
    for name in ("density", "ranks"):
        results, drawn = structure.analyse_structure(random_vlm, scene_split, 1, 0, [name, "kept"], quiet)
        assert list(results) == list(drawn) == [name]


# ── Bad input ────────────────────────────────────────────────────────────────


def test_a_pruned_encoder_is_refused(random_vlm):
    structure.check_structure(random_vlm.tower)
    random_vlm.tower.blocks[0].make_ffn_linear(4)
    with pytest.raises(InfopruneError, match="linear and mlp FFNs; name the original model") as caught:
        structure.check_structure(random_vlm.tower)
    assert "\n" not in str(caught.value)


def test_an_encoder_that_lost_heads_is_refused(random_vlm):
    random_vlm.tower.blocks[3].keep_heads([0, 2])
    with pytest.raises(InfopruneError, match=r"\[4, 4, 4, 2, 4\] heads per block"):
        structure.check_structure(random_vlm.tower)


# ── Figures ──────────────────────────────────────────────────────────────────


def parse(svg: str) -> ET.Element:
    assert svg.startswith("<svg")
    return ET.fromstring(svg)


def lines(root: ET.Element, points: int) -> list[np.ndarray]:
    """Lines of so many points inside the axes, in drawing order, as pixel coordinates [points, 2]."""
    found = []
    for path in root.iter(f"{SVG}path"):
        if "fill: none" in path.get("style", "") and "stroke" in path.get("style", ""):
            numbers = re.findall(r"-?\d+\.?\d*", path.get("d", ""))
            if len(numbers) == 2 * points:
                found.append(np.array(numbers, float).reshape(points, 2))
    return found


def texts(root: ET.Element) -> str:
    return " | ".join("".join(node.itertext()).strip() for node in root.iter(f"{SVG}text"))


def assert_affine(pixels: np.ndarray, values: np.ndarray) -> None:
    """One axis maps values on pixels, upwards: straight, and not flat."""
    slope, offset = np.polyfit(values, pixels, 1)
    assert slope < 0
    np.testing.assert_allclose(slope * values + offset, pixels, atol=0.02)


def cells(svg: str, count: int) -> list[str]:
    """Colours of the maps' cells, in drawing order."""
    styles = [path.get("style", "") for path in parse(svg).iter(f"{SVG}path")]
    filled = [re.search(r"fill: (#\w+); stroke: #ffffff", style) for style in styles]
    found = [match.group(1) for match in filled if match]
    assert len(found) == count
    return found


def test_head_maps_colour_every_head_by_its_value():
    importance = [[0.0, 0.5, 1.0], [0.25, 0.75, 0.1]]
    damage = [[1e-3, 1e-1, 1e-2], [0.0, 1e-9, 10**-1.5]]
    drawn = cells(structure_figures.head_maps(importance, damage), 12)
    viridis = colormaps["viridis"]
    assert drawn[:6] == [to_hex(viridis(value)) for row in importance for value in row]
    # From the largest, .1, down to .001, the smallest within six decades of it; what is below is as dark.
    shares = [0.0, 1.0, 0.5, 0.0, 0.0, 0.75]
    assert drawn[6:] == [to_hex(viridis(share)) for share in shares]


def test_head_maps_take_heads_that_cost_nothing_and_many_blocks():
    svg = structure_figures.head_maps(np.zeros((32, 16)).tolist(), np.zeros((32, 16)).tolist())
    cells(svg, 2 * 512)
    assert "importance" in texts(parse(svg))


def test_densities_are_drawn_in_percent():
    shares = {"W1": [1.0, 0.5, 0.25], "W2": [0.1, 0.9, 0.3], "W1W2": [0.0, 0.2, 0.6]}
    root = parse(structure_figures.density_lines(shares))
    drawn = lines(root, 3)[:3]  # behind them come the legend's
    assert {"W1", "W2", "W1 W2"} <= set(texts(root).split(" | "))
    assert_affine(np.concatenate([line[:, 1] for line in drawn]), np.concatenate(list(shares.values())))


def test_ranks_are_drawn_with_the_rank_that_breaks_even():
    ranks = {"features": 32, "break_even": 16.0, "by_epsilon": {"0.05": [10, 20, 5], "0.001": [30, 31, 32]}}
    root = parse(structure_figures.rank_lines(ranks))
    curves = lines(root, 3)
    across = [line for line in lines(root, 2) if np.ptp(line[:, 1]) == 0 and np.ptp(line[:, 0]) > 100]
    limits = [line[0, 1] for line in across if line[0, 1] not in (max(row[0, 1] for row in across),)]
    assert len(limits) == 2, "break-even and all; the lowest line is the axis"
    assert_affine(np.array([*curves[0][:, 1], *curves[1][:, 1], *limits]), np.array([10, 20, 5, 30, 31, 32, 16, 32]))
    for expected in ("break-even, D/2 = 16", "all, D = 32", "ε = 0.05", "ε = 0.001"):
        assert expected in texts(root), expected


def test_damage_is_drawn_on_one_log_scale():
    curves = {
        "heads": [
            {"removed": [1, 2, 4], "damage": [1e-3, 1e-2, 1.0]},
            {"removed": [1, 2, 4], "damage": [0.1, 0.2, 0.3]},
        ],
        "neurons": [
            {"removed": [8, 16, 32], "damage": [1e-2, 0.5, 2.0]},
            {"removed": [8, 16, 32], "damage": [1e-3, 0.1, 10.0]},
        ],
    }
    root = parse(structure_figures.damage_panels(curves))
    drawn = lines(root, 3)
    assert len(drawn) == 4
    damage = [value for rows in curves.values() for row in rows for value in row["damage"]]
    assert_affine(np.concatenate([line[:, 1] for line in drawn]), np.log10(damage))
    for line in drawn:
        assert (line[1, 0] - line[0, 0]) / (line[2, 0] - line[0, 0]) == pytest.approx(1 / 3, abs=1e-3)
    for expected in ("heads removed", "neurons removed", "summed damage", "block"):
        assert expected in texts(root), expected
