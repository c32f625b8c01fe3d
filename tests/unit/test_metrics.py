"""calm_jax.evaluation.metrics and protocols: figures against values known by hand."""

import math

import numpy as np
import pytest

from calm_jax.evaluation import metrics, protocols


def test_correlations():
    true = np.asarray([1.0, 2.0, 3.0, 4.0])
    assert metrics.plcc(2 * true + 1, true) == pytest.approx(1.0)
    assert metrics.srcc(np.exp(true), true) == pytest.approx(1.0)
    assert metrics.srcc(-true, true) == pytest.approx(-1.0)
    assert metrics.plcc(np.asarray([1.0, 3.0, 2.0, 4.0]), true) == pytest.approx(0.8)
    assert math.isnan(metrics.plcc(np.ones(4), true))


def test_intervals_widen_with_dependence():
    rng = np.random.default_rng(0)
    right = np.repeat(rng.integers(0, 2, 20), 10).astype(float)  # the ten answers about a photograph agree
    statistic = lambda indices: right[indices].mean()  # noqa: E731
    apart = metrics.interval(statistic, [str(i) for i in range(200)])
    together = metrics.interval(statistic, [str(i // 10) for i in range(200)])
    assert apart[0] < right.mean() < apart[1]
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])
    assert metrics.interval(statistic, ["a"] * 200, seed=1) == metrics.interval(statistic, ["a"] * 200, seed=1)


def test_the_interval_of_a_mean_is_the_same_two_stage_bootstrap():
    rng = np.random.default_rng(1)
    groups = [f"photo{i}" for i in range(5) for _ in range(4 + 7 * i)]  # photographs with unlike numbers of answers
    values = rng.normal(size=len(groups)) + 0.1 * np.asarray([int(g[-1]) for g in groups])
    slow, fast = metrics.interval(lambda i: values[i].mean(), groups), metrics.mean_interval(values, groups)
    assert np.allclose(slow, fast, atol=0.1 * (slow[1] - slow[0]))
    assert metrics.mean_interval(np.ones(9), ["a"] * 9) == (1.0, 1.0)


def answer(subject, kind, group, key, true, said):
    return protocols.Answered(subject, kind, group, key, (), "?", true, said, said)


def test_attribute_table_counts_majority_gain_and_control():
    items = [answer("noise", "grade", f"photo{i // 10}", f"{i}", str(i % 2), str(i % 2)) for i in range(40)]
    wrong = [answer(a.subject, a.kind, a.group, a.key, a.true, "1") for a in items]
    items += [answer("tilt", "comparison", "photo1", f"t{i}", "first", "second") for i in range(3)]
    wrong += items[40:]
    rows = protocols.attribute_table(items, wrong)
    assert [(row["subject"], row["kind"]) for row in rows] == [("noise", "grade"), ("tilt", "comparison")]
    noise, tilt = rows
    assert (noise["n"], noise["accuracy"], noise["majority"], noise["gain"]) == (40, 1.0, 0.5, 0.5)
    assert noise["control"] == 0.5 and noise["control_gain"] == 0.5
    assert noise["control_gain_interval"][0] > 0.2
    assert noise["photographs"] == {"photo0": 1.0, "photo1": 1.0, "photo2": 1.0, "photo3": 1.0}
    assert tilt["accuracy"] == 0.0 and tilt["gain"] == -1.0
    assert noise["elsewhere"] == noise["elsewhere_gain"] == 0.5 and noise["elsewhere_gain_interval"][0] > 0.2
    assert "elsewhere" not in tilt  # of one photograph alone


def test_other_photographs_are_judged_by_what_was_said_about_them():
    """Answers that follow the photograph gain; those that fit every photograph alike do not, whatever the majority."""
    truths = "0", "1", "1", "0", "1", "1"
    items = [answer("noise", "grade", f"photo{i // 2}", f"{i}", true, "1") for i, true in enumerate(truths)]
    [row] = protocols.attribute_table(items)
    assert row["accuracy"] == row["elsewhere"] == pytest.approx(4 / 6) and row["elsewhere_gain"] == 0
    items = [answer("noise", "grade", f"photo{i // 2}", f"{i}", true, true) for i, true in enumerate(truths)]
    others = [np.mean([b == a for j, b in enumerate(truths) if j // 2 != i // 2]) for i, a in enumerate(truths)]
    [row] = protocols.attribute_table(items)
    assert row["elsewhere"] == pytest.approx(np.mean(others)) and row["elsewhere_gain"] == pytest.approx(
        1 - np.mean(others))


def test_score_table_counts_what_cannot_be_read():
    items = [protocols.Answered("score", "score", "g", str(i), (), "?", f"{i}.0.", f"{i}.0.", str(float(i)))
             for i in range(2, 8)]
    items.append(protocols.Answered("score", "score", "g", "x", (), "?", "5.0.", "no idea", ""))
    table = protocols.score_table(items)
    assert table["n"] == 7 and table["parse_failures"] == pytest.approx(1 / 7)
    assert table["plcc"] == pytest.approx(1.0) and table["mae"] == 0.0
