"""Plans: what is no plan is refused, and sizes count what is gone."""

from __future__ import annotations

import json

import pytest
import torch
from decoders import model_of

from infoprune_export.errors import InfopruneError
from infoprune_export.language.plan import LanguagePlan, LayerSize, apply_language, sizes_of
from infoprune_export.models.language import language_layers

TOTAL = (LayerSize(4, 2, 8), LayerSize(4, 4, 8))


def plan(heads=((2, 3), (0, 2, 3)), neurons=((1, 5), (0, 1, 2, 3, 4, 5, 6, 7)), total=TOTAL):
    return LanguagePlan(total, heads, neurons)


def test_sizes_and_fractions():
    assert plan().kept == (LayerSize(2, 1, 2), LayerSize(3, 3, 8))
    assert plan().attention_kept == pytest.approx((3 + 6) / (6 + 8))
    assert plan().ffn_kept == pytest.approx(10 / 16)
    assert LanguagePlan.full(TOTAL).kept == TOTAL
    assert LanguagePlan.full(()).kept == ()


def test_there_and_back_through_json():
    assert LanguagePlan.from_dict(json.loads(json.dumps(plan().to_dict()))) == plan()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"heads": ((2, 3),)}, "heads of 1 and neurons of 2 layers for 2 layers"),
        ({"heads": ((), (0,))}, "layer 0: heads must be ascending, at least one, out of 0..3"),
        ({"heads": ((2, 3), (0, 4))}, "layer 1: heads must be"),
        ({"heads": ((-1, 0), (0,))}, "layer 0: heads must be"),
        ({"heads": ((3, 2), (0,))}, "layer 0: heads must be"),
        ({"heads": ((0, 1, 2), (0,))}, "groups of 2: .* equally many"),
        ({"neurons": ((0,), ())}, "layer 1: neurons must be ascending, at least one, out of 0..7"),
        ({"neurons": ((0, 8), (0,))}, "layer 0: neurons must be"),
        ({"neurons": ((0, 0), (0,))}, "layer 0: neurons must be"),
    ],
)
def test_what_is_no_plan_is_refused(change, match):
    with pytest.raises(InfopruneError, match=match):
        plan(**change)


def test_a_plan_for_other_layers_is_refused():
    with pytest.raises(InfopruneError, match="plan is for 2 layers of .*, the model has 5 of"):
        apply_language(language_layers(model_of("llava")), plan(), {})


def test_weights_are_put_where_they_belong_and_must_fit():
    model = model_of("llava")
    layers = language_layers(model)
    total = sizes_of(layers)
    some = LanguagePlan(total, ((2, 3),) * 5, (tuple(range(6)),) * 5)
    out, down = torch.randn(64, 32), torch.randn(64, 6)
    apply_language(layers, some, {"3.attention_out.weight": out, "4.ffn_out.weight": down})
    assert torch.equal(layers[3].attention_out.weight, out)
    assert torch.equal(layers[4].ffn_out.weight, down)
    with pytest.raises(InfopruneError, match=r"weight of a language projection is \[64, 5\].*needs \[64, 6\]"):
        apply_language(layers, LanguagePlan.full(sizes_of(layers)), {"0.ffn_out.weight": down[:, :5]})
