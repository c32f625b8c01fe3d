"""Taste in closed form: against plain algebra, what leave-one-out chooses, and what can go wrong with few ratings."""

from __future__ import annotations

import math

import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax.evaluation import metrics
from calm_jax.inference import taste

RNG = np.random.default_rng(0)


def pictures(count: int, width: int = 24) -> np.ndarray:
    found = RNG.normal(size=(count, width))
    found -= found.mean(1, keepdims=True)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("generic", [None, "known"])
def test_scores_are_those_of_ridge_regression_by_plain_algebra(generic):
    rated, asked = pictures(12), pictures(5)
    ratings = RNG.uniform(2, 9, 12)
    base, there = (None, None) if generic is None else (RNG.uniform(3, 8, 12), RNG.uniform(3, 8, 5))
    own = taste.Taste.of(rated, ratings, base)
    rest = ratings - (0 if base is None else base)
    centred = rated - rated.mean(0)
    if math.isfinite(own.strength):
        penalty = own.strength * np.square(centred).sum() / 11
        slope = np.linalg.solve(centred.T @ centred + penalty * np.eye(24), centred.T @ (rest - rest.mean()))
    else:
        slope = np.zeros(24)
    expected = rest.mean() + (asked - rated.mean(0)) @ slope + (0 if there is None else there)
    np.testing.assert_allclose([score.value for score in own.scores(asked, there)], np.clip(expected, 1, 10))


def test_the_error_is_that_of_leaving_each_rating_out():
    rated, ratings = pictures(15), RNG.uniform(1, 10, 15)
    own = taste.Taste.of(rated, ratings, None)
    unit, left = np.square(rated - rated.mean(0)).sum() / 14, []
    for place in range(15):
        others = np.delete(np.arange(15), place)
        # The penalty stays that of all ratings, as in the closed form, and the mean is that of the others.
        centre, mean = rated[others].mean(0), ratings[others].mean()
        seen = rated[others] - centre
        slope = np.linalg.solve(seen.T @ seen + own.strength * unit * np.eye(24), seen.T @ (ratings[others] - mean))
        left.append(ratings[place] - mean - (rated[place] - centre) @ slope)
    assert own.error == pytest.approx(np.sqrt(np.mean(np.square(left))), rel=1e-9)


def test_a_taste_is_learned_and_noise_is_left_alone():
    direction, many, asked = RNG.normal(size=24), pictures(120), pictures(200)
    generic, there = RNG.uniform(3, 8, 120), RNG.uniform(3, 8, 200)
    fond = taste.Taste.of(many, np.clip(generic + 4 * many @ direction / 4.9, 1, 10), generic)
    true = there + 4 * asked @ direction / 4.9
    said = [score.value for score in fond.scores(asked, there)]
    assert fond.strength == min(taste.STRENGTHS) and metrics.srcc(np.asarray(said), true) > metrics.srcc(there, true)
    chosen = []
    for _ in range(20):
        rated, base = pictures(40), RNG.uniform(3, 8, 40)
        chosen.append(taste.Taste.of(rated, base + RNG.normal(size=40), base).strength)
    assert np.mean([math.isinf(strength) for strength in chosen]) > 0.5


@pytest.mark.parametrize("count", [1, 2])
def test_few_ratings_move_the_mean_alone_or_nearly(count):
    rated, asked, generic = pictures(count), pictures(3), np.full(count, 6.0)
    own = taste.Taste.of(rated, [4.0, 5.0][:count], generic)
    values = [score.value for score in own.scores(asked, [7.0, 6.0, 5.0])]
    assert np.isfinite(values).all() and values == sorted(values, reverse=True)
    assert np.mean(values) == pytest.approx(6 - 2 + (count - 1) / 2, abs=0.2)
    assert math.isnan(own.error) == (count == 1)


def test_equal_pictures_and_equal_ratings_are_no_trouble():
    same = np.repeat(pictures(1), 6, 0)
    own = taste.Taste.of(same, [3, 4, 5, 6, 7, 8], None)
    assert [score.value for score in own.scores(pictures(2), None)] == pytest.approx([5.5, 5.5])
    flat = taste.Taste.of(pictures(6), [7.0] * 6, None)
    assert [score.value for score in flat.scores(pictures(2), None)] == pytest.approx([7.0, 7.0])
    assert taste.Taste.of(pictures(4), [10.0] * 4, [2.0] * 4).scores(pictures(1), [9.0])[0].value == 10.0  # the scale


@pytest.mark.parametrize("rows", [3, 2])
def test_features_are_the_class_token_of_the_high_level_or_the_mean(rows):
    statistics = {part: RNG.normal(size=(3, rows, 12)) for part in config_lib.PARTS}
    found = taste.features(statistics)
    expected = statistics["high"][:, 2 if rows == 3 else 0]
    assert np.corrcoef(found.ravel(), (expected - expected.mean(1, keepdims=True)).ravel())[0, 1] > 0.9
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    np.testing.assert_allclose(found.sum(1), 0, atol=1e-9)
