"""tools.bench inference: both sides run, agree, and stand beside known floors."""

import miniature
import pytest

from calm_jax import config as config_lib
from tools import bench_inference, flops


def test_the_benchmark_runs_both_sides(tmp_path):
    result = bench_inference.measure(miniature.config(), tmp_path, against=True, rounds=2)
    assert set(result["results"]) == {"calm_jax", "torch"}
    for row in result["results"].values():
        assert row["score_s"] > 0 and row["peak_bytes"] > 2**27
    text = bench_inference.show(result)
    assert "times as fast as torch: scoring " in text and "GFLOP a score" in text


def test_floors_are_those_of_the_public_geometry():
    """Vicuna-7B has 6.738 billion weights, of which the embedding (32,000 x 4,096) is looked up; a prompt of 700
    tokens costs two products for each of the others but the head, and half a square of attention. CLIP-L/14-336 (303
    million weights, 577 tokens) costs 0.38 TFLOP a picture; three BERT-base with 32 queries that read it 0.05."""
    model = config_lib.model("7b")
    assert flops.language(model, 1, 1).weights / 2 == pytest.approx(6.738e9 - 32_000 * 4096, rel=1e-3)
    words = 2 * 700 * (6.738e9 - 2 * 32_000 * 4096)
    attention = 2 * 32 * 700 ** 2 * 4096
    assert flops.a_score(model, 700).forward - words - attention == pytest.approx(0.43e12, rel=0.05)
