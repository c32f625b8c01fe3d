"""tools.bench inference: both sides run, agree, and stand beside known floors."""

import miniature
import pytest

from calm_jax import config as config_lib
from calm_jax.models import flops
from tools.bench import contenders
from tools.bench import inference as bench_inference
from tools.bench import pictures as bench_pictures


@pytest.mark.slow
def test_the_benchmark_runs_both_sides(tmp_path):
    pytest.importorskip("torch", reason="torch is not here; make test has it")
    result = bench_inference.measure(miniature.config(), tmp_path, against=True, rounds=2)
    assert set(result["results"]) == {"calm_jax", "torch"}
    for row in result["results"].values():
        assert row["score_s"] > 0 and row["peak_bytes"] > 2**27
    text = bench_inference.show(result)
    assert "times as fast as torch: scoring " in text and "GFLOP a score" in text


@pytest.mark.slow
def test_photographs_are_looked_at_cold_and_warm(tmp_path, monkeypatch):
    monkeypatch.setattr(contenders, "ENVIRONMENT", miniature.environment(tmp_path / "compiled"))
    config = miniature.config(processes={"only": miniature.process(train=("mfam/.*",), freeze=(
        "encoder/.*", "decoder/.*"))})
    result = bench_pictures.measure(config, tmp_path, rounds=1, pictures=6) | {"machine": "m"}
    assert all(rates["cold"][0] > 0 and rates["warm"][0] > 0 for rates in result["results"].values())
    assert result["results"]["train"]["cold"][0] < result["results"]["train"]["warm"][0]  # where nothing is computed
    assert "warm / cold" in bench_pictures.show(result) and not (tmp_path / "cache").exists()


def test_rounds_are_compared_with_themselves():
    """A machine that is three times slower in one round, and the prompt's time, change neither speed nor ratio."""
    def played(score, first, token):
        jobs = [score, *(seconds for batch in bench_inference.BATCHES for seconds in (
            first, first + token * batch * (bench_inference.TOKENS - 1)))]
        return contenders.Played({}, {}, [[{"seconds": seconds * slow, "peak": 2**30} for seconds in jobs]
                                          for slow in (50, 1, 3, 1)])

    names = ["score 8", *(f"{job} {batch}" for batch in bench_inference.BATCHES for job in ("first", "answer"))]
    rows = {"calm_jax": bench_inference._row(played(4.0, 9.0, 0.01), names),
            "torch": bench_inference._row(played(6.0, 2.0, 0.02), names)}
    assert [rows["calm_jax"][name] for name in ("score_s", "token_s_1", "token_s_8")] == pytest.approx([0.5, .01, .01])
    assert bench_inference._ratios(rows) == [
        "1.50 (1.50 to 1.50)", "2.00 (2.00 to 2.00)", "2.00 (2.00 to 2.00)", "1.00"]


def test_floors_are_those_of_the_public_geometry():
    """Vicuna-7B has 6.738 billion weights, of which the embedding (32,000 x 4,096) is looked up; a prompt of 700
    tokens costs two products for each of the others but the head, and half a square of attention. CLIP-L/14-336 (303
    million weights, 577 tokens) costs 0.38 TFLOP a picture; three BERT-base with 32 queries that read it 0.05."""
    model = config_lib.model("7b")
    assert flops.language(model, 1, 1).weights / 2 == pytest.approx(6.738e9 - 32_000 * 4096, rel=1e-3)
    words = 2 * 700 * (6.738e9 - 2 * 32_000 * 4096)
    attention = 2 * 32 * 700 ** 2 * 4096
    assert flops.a_score(model, 700).forward - words - attention == pytest.approx(0.43e12, rel=0.05)
