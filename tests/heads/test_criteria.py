"""Every criterion on towers whose best or worst head is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.analysis.spectra import effective_rank, singular_values
from infoprune_export.errors import InfopruneError
from infoprune_export.heads.attention_mass import nonlocal_ratio
from infoprune_export.heads.criteria import CRITERIA, Evidence, score_heads
from infoprune_export.heads.gates import gated, head_grams
from infoprune_export.heads.michel import michel, michel_iterative
from infoprune_export.heads.plan import plan_heads
from infoprune_export.models import tower_of
from infoprune_export.models.calibration import TaskLoss, captured_input, inputs_of
from infoprune_export.models.tower import Context, Form
from infoprune_export.models.vlm import VLM
from infoprune_export.recipe import HeadsSpec
from tests import families

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=30)
BLOCKS, HEADS, WIDTH = 5, 4, 8


def evidence(vlm: VLM, samples, method: str, *, seed: int = 0, labelled: bool = True, **settings: object) -> Evidence:
    spec = HeadsSpec(method=method, **settings)
    return Evidence(vlm, samples, TaskLoss(labelled, vlm.tower), spec, seed)


def channels(head: int) -> slice:
    return slice(head * WIDTH, (head + 1) * WIDTH)


@torch.no_grad()
def silence(vlm: VLM, block: int, head: int) -> None:
    """Nothing of this head reaches the residual stream."""
    vlm.tower.blocks[block].attention_out.weight[:, channels(head)] = 0.0


@pytest.fixture
def samples(scene_split):
    return scene_split.calibration[:8]


# ── All ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", CRITERIA)
def test_scores_are_finite_repeatable_and_leave_the_tower_alone(random_vlm, samples, pixels, method):
    before = random_vlm.tower.features_of(pixels)
    done: list[float] = []
    known = evidence(random_vlm, samples, method, rounds=2)
    scores = score_heads(Evidence(**{**vars(known), "advance": done.append}))
    assert scores.shape == (BLOCKS, HEADS)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    assert scores.std() > 0
    assert torch.equal(score_heads(known), scores)
    assert torch.equal(random_vlm.tower.features_of(pixels), before)
    if done:
        assert sum(done) == pytest.approx(1.0)
    assert sum(map(len, plan_heads(scores, known.spec).kept)) == BLOCKS * HEADS // 2


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("method", ["magnitude", "activation", "michel", "michel_iterative"])
def test_a_head_without_effect_goes_first(random_vlm, samples, method, labelled):
    silence(random_vlm, 2, 1)
    scores = score_heads(evidence(random_vlm, samples, method, labelled=labelled, rounds=10))
    assert scores.argmin() == 2 * HEADS + 1
    assert scores[2, 1] == 0.0


@pytest.mark.parametrize("method", CRITERIA)
def test_pruned_towers_are_refused(random_vlm, samples, method):
    random_vlm.tower.blocks[1].keep_heads([0])
    with pytest.raises(InfopruneError, match="unpruned"):
        score_heads(evidence(random_vlm, samples, method))


def test_a_method_that_trains_is_no_criterion(random_vlm, samples):
    with pytest.raises(InfopruneError, match="heads.method = 'budgeted' is no criterion; there are: obs, random"):
        score_heads(evidence(random_vlm, samples, "budgeted"))


@REPEATABLE
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 0.99), st.integers(0, 99), st.integers(1, 3))
def test_the_budget_is_exact_whatever_scores_tie(blocks: int, heads: int, remove: float, seed: int, levels: int):
    scores = torch.randint(levels, (blocks, heads), generator=torch.Generator().manual_seed(seed)).float()
    plan = plan_heads(scores, HeadsSpec(method="michel", remove=remove))
    assert sum(map(len, plan.kept)) == max(1, blocks * heads - int(blocks * heads * remove + 0.5))


# ── One by one ───────────────────────────────────────────────────────────────


def test_random_follows_the_seed(random_vlm, samples):
    scores = [score_heads(evidence(random_vlm, samples, "random", seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_magnitude_is_the_product_of_norms_and_blind_to_rescaling(random_vlm, samples):
    block = random_vlm.tower.blocks[1]
    attention = block.module.self_attn
    rows = torch.cat([attention.v_proj.weight, attention.v_proj.bias[:, None]], dim=1)
    expected = rows[channels(2)].norm() * attention.out_proj.weight[:, channels(2)].norm()
    scores = score_heads(evidence(random_vlm, samples, "magnitude"))
    assert scores[1, 2].item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        attention.v_proj.weight[channels(2)] *= 4
        attention.v_proj.bias[channels(2)] *= 4
        attention.out_proj.weight[:, channels(2)] /= 4
        attention.out_proj.weight[:, channels(3)] *= 2
    again = score_heads(evidence(random_vlm, samples, "magnitude"))
    expected_scores = scores.clone()
    expected_scores[1, 3] *= 2
    torch.testing.assert_close(again, expected_scores)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_value_rows_are_the_value_projections_of_every_family(family):
    tower = tower_of(families.build(family))
    block = tower.blocks[0]
    hidden = torch.randn(1, 7, block.value_rows.shape[1] - 1, generator=families.seeded())
    hidden = hidden if len(block._names.qkv) == 3 else hidden[0]
    cosine = torch.ones(7, 1, 1, block.head_dim)
    with torch.no_grad():
        context = Context(cosine, 0 * cosine) if hidden.ndim == 2 else Context()
        value = block.query_key_value(hidden, context)[2].flatten(-2)
        rows = block.value_rows
        torch.testing.assert_close(hidden @ rows[:, :-1].T + rows[:, -1], value, rtol=1e-4, atol=1e-5)


def test_activation_is_the_mean_norm_of_what_a_head_adds(random_vlm, samples):
    block = random_vlm.tower.blocks[3]
    with torch.no_grad(), captured_input(block.attention_out) as last:
        random_vlm.tower.features_of(inputs_of(random_vlm, samples))
        z = last().flatten(0, -2)[:, channels(1)]
        added = z @ block.attention_out.weight[:, channels(1)].T
    scores = score_heads(evidence(random_vlm, samples, "activation"))
    assert scores[3, 1].item() == pytest.approx(added.square().sum(1).mean().sqrt().item(), rel=1e-4)


def test_erank_drop_equals_the_rank_of_the_tower_without_the_head(random_vlm, samples):
    gram = head_grams(random_vlm, samples)[2]
    rest = [c for c in range(HEADS * WIDTH) if not 3 * WIDTH <= c < 4 * WIDTH]
    whole, left = (effective_rank(singular_values(g)) for g in (gram, gram[rest][:, rest]))
    scores = score_heads(evidence(random_vlm, samples, "erank_drop"))
    assert scores[2, 3].item() == pytest.approx(((whole - left) / whole).item(), rel=1e-5)


def test_erank_drop_protects_what_is_unlike_the_rest_and_gives_a_dominant_head_away(random_vlm, samples, monkeypatch):
    """A diagonal Gram: head 0 dominates, head 1 adds almost nothing, heads 2 and 3 carry the spectrum."""
    diagonal = torch.tensor([1e6, 1e-6, 1.0, 1.0], dtype=torch.float64).repeat_interleave(WIDTH)
    monkeypatch.setattr("infoprune_export.heads.criteria.head_grams", lambda *_: [torch.diag(diagonal)] * BLOCKS)
    scores = score_heads(evidence(random_vlm, samples, "erank_drop"))[0]
    assert scores[0] < 0 < scores[1] < scores[2]
    assert scores[2] == pytest.approx(scores[3])


def test_a_head_that_alone_carries_the_answer_stays(random_vlm, samples):
    """With every other head of all blocks silent, the loss depends on one."""
    for block in range(BLOCKS):
        for head in range(HEADS):
            if (block, head) != (3, 2):
                silence(random_vlm, block, head)
    for method in ("michel", "michel_iterative", "activation", "magnitude"):
        scores = score_heads(evidence(random_vlm, samples, method, rounds=4))
        assert scores.argmax() == 3 * HEADS + 2, method


def test_michel_is_normalised_within_blocks(random_vlm, samples):
    loss = TaskLoss(True, random_vlm.tower)
    torch.testing.assert_close(michel(random_vlm, samples, loss).norm(dim=1), torch.ones(BLOCKS, dtype=torch.float64))


def test_michel_equals_the_loss_by_finite_differences(random_vlm, samples):
    import numpy as np

    loss, batch = TaskLoss(True, random_vlm.tower), samples[:4]
    slopes = []
    for head in range(HEADS):
        ends = []
        for sign in (1, -1):
            gates = torch.ones(BLOCKS, HEADS)
            gates[4, head] += sign * 0.05
            with torch.no_grad(), gated(random_vlm.tower, list(gates)):
                ends.append(loss(random_vlm, batch, np.random.default_rng([0, 0])).item())
        slopes.append(abs(ends[0] - ends[1]))
    expected = torch.tensor(slopes, dtype=torch.float64)
    torch.testing.assert_close(michel(random_vlm, batch, loss)[4], expected / expected.norm(), rtol=0.05, atol=0.02)


def test_iterative_michel_is_an_order_and_one_round_is_one_shot(random_vlm, samples):
    loss = TaskLoss(True, random_vlm.tower)
    once = michel(random_vlm, samples, loss)
    single = michel_iterative(random_vlm, samples, loss, rounds=1)
    assert sorted(single.flatten().tolist()) == list(range(BLOCKS * HEADS))
    assert torch.equal(single.flatten().argsort(), once.flatten().argsort(stable=True))
    several = michel_iterative(random_vlm, samples, loss, rounds=5)
    assert sorted(several.flatten().tolist()) == list(range(BLOCKS * HEADS))
    assert several.flatten().argsort()[:4].sort().values.equal(once.flatten().argsort()[:4].sort().values)
    assert not torch.equal(several, single), "what is left must be measured again"


def test_iterative_michel_spares_the_second_of_two_doubles(random_vlm, samples):
    """Two heads that each do half of one job: without the first, the other is measured anew and never both at once."""
    seen: list[torch.Tensor] = []

    def measured(vlm, samples, loss, *, mask, seed, advance):
        seen.append(mask.clone())
        importance = torch.full((BLOCKS, HEADS), 5.0, dtype=torch.float64)
        both = bool(mask[0, 0] and mask[0, 1])
        importance[0, :2] = 1.0 if both else 9.0
        return importance * mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infoprune_export.heads.michel.michel", measured)
        order = michel_iterative(random_vlm, samples, None, rounds=BLOCKS * HEADS)
    assert order[0, 1] == 0
    assert order[0, 0] == BLOCKS * HEADS - 1
    assert [int(mask.sum()) for mask in seen] == list(range(BLOCKS * HEADS, 0, -1))


# ── Attention mass ───────────────────────────────────────────────────────────


@torch.no_grad()
def blind(block, head: int) -> None:
    """This head's queries are zero, so that it looks everywhere alike."""
    block.module.self_attn.q_proj.weight[channels(head)] = 0.0
    block.module.self_attn.q_proj.bias[channels(head)] = 0.0


def test_a_head_that_looks_everywhere_alike_has_the_grids_own_ratio(random_vlm, samples):
    blind(random_vlm.tower.blocks[1], 2)
    # 8 x 8 patches: 22^2 ordered pairs of neighbours; and [CLS] among the 65 keys
    expected = (64 * 65 - 22**2) / 22**2
    assert nonlocal_ratio(random_vlm, samples[:2])[1, 2].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_nonlocal_ratio_equals_its_definition_in_every_family(family, monkeypatch):
    model = families.build(family)
    tower = tower_of(model)
    inputs = tower.example_inputs(1, families.seeded(2))
    monkeypatch.setattr("infoprune_export.heads.attention_mass.inputs_of", lambda *_: inputs)
    ratio = nonlocal_ratio(VLM(model, None, tower), [None])
    planned = tower.plan(inputs, Form())
    with torch.no_grad():
        stream, context = tower.embed(planned)
        block = tower.blocks[0]
        query, key, _ = block.query_key_value(block.normalised(stream), context)
    query, key = (part.reshape(-1, *part.shape[-3:]) for part in (query, key))
    size = query.shape[1]
    if "position_ids" in planned:
        places = planned["position_ids"].tolist()
    else:
        side = int(size**0.5)
        places = [None] * (size - side**2) + [[row, column] for row in range(side) for column in range(side)]
    segments = context.segments(block.windowed)
    segment = [0] * size if segments is None else (segments.inverse // segments.index.shape[1]).tolist()
    near = far = 0.0
    for image in range(query.shape[0]):
        for q in range(size):
            keys = [k for k in range(size) if segment[k] == segment[q]]
            weights = (key[image, keys, 1] @ query[image, q, 1] * block.head_dim**-0.5).softmax(0)
            for k, weight in zip(keys, weights.tolist(), strict=True):
                if places[q] is None:
                    continue
                close = (
                    places[k] is not None and max(abs(a - b) for a, b in zip(places[q], places[k], strict=True)) <= 1
                )
                near, far = (near + weight, far) if close else (near, far + weight)
    assert ratio[0, 1].item() == pytest.approx(far / near, rel=1e-3)
