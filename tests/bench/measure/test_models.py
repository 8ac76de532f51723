"""Shapes of models."""

from bench.measure.models import MODEL_SHAPES, model_shapes


def test_models_that_share_a_shape_give_it_once():
    both = model_shapes(["llama-3-8b", "mistral-7b"])
    assert len(both) == len(set(both)) == len(MODEL_SHAPES["llama-3-8b"])
