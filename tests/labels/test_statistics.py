"""calm_jax.data.statistics and measured: known numbers, exact tenths, answers that agree."""

import collections
import time

import numpy as np
import pytest
import scipy.ndimage

from calm_jax import config as config_lib
from calm_jax.data import attributes, builders, cues, images, statistics, statistics_cues
from calm_jax.data.samples import BadRecord, ImageRef, Mention, Record
from calm_jax.data.tasks import measured
from calm_jax.data.tasks.context import Context
from calm_jax.errors import ConfigError

NAMES = tuple(statistics.STATISTICS)
MOST = 1.0  # times a wide Gaussian blur: all statistics of one picture of 224 pixels


def picture(seed=0, shape=(120, 160)):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def flat(colour, shape=(64, 64)):
    return np.broadcast_to(np.asarray(colour, np.uint8), (*shape, 3)).copy()


def records(count=40):
    """Records with the deciles of `count` pictures of noise, differently lit."""
    pixels = [(picture(seed) * np.linspace(0.2, 1, count)[seed]).astype(np.uint8) for seed in range(count)]
    deciles = statistics.deciles_of(statistics.columns([statistics.measure(one) for one in pixels]))
    return [Record(f"r{i}", ImageRef(i, (0.0, 0.0, 0.5, 0.5)), deciles=one) for i, one in enumerate(deciles)]


# --- numbers


def test_flat_pictures():
    grey = statistics.measure(flat((90, 90, 90)))
    assert grey["brightness"] == pytest.approx(90, abs=1e-3)
    for name in ("tonal_spread", "acuity", "grain", "highlights", "shadows", "edge_density", "tones", "colourfulness",
                 "vividness", "colour_variety", "falloff", "light_above", "light_right", "warmth", "greenness"):
        assert grey[name] == pytest.approx(0, abs=1e-4), name
    for name in ("hue", "hue_unity", "symmetry", "detail_height", "detail_side", "thirds", "centre_focus"):
        assert np.isnan(grey[name]), name
    assert grey["free_space"] == 1
    assert statistics.measure(flat((255, 255, 255)))["highlights"] == 1
    black = statistics.measure(flat((0, 0, 0)))
    assert black["shadows"] == 1 and black["vividness"] == 0


@pytest.mark.parametrize(("colour", "name"), [
    ((255, 0, 0), "red"), ((200, 110, 20), "orange"), ((230, 220, 0), "yellow"), ((140, 255, 0), "lime"),
    ((20, 160, 40), "green"), ((0, 200, 190), "turquoise"), ((90, 170, 230), "azure"), ((20, 30, 220), "blue"),
    ((120, 30, 220), "purple"), ((240, 60, 170), "pink"), ((250, 20, 70), "red"),
])
def test_hues_have_their_names(colour, name):
    statistic = statistics.get("hue")
    values = statistics.measure(flat(colour))
    assert statistic.cues.words[statistics.decile(values["hue"], statistic.edges)] == name
    assert values["hue_unity"] == pytest.approx(1)


def test_where_no_hue_dominates_there_is_none():
    half = flat((250, 40, 40))
    half[:32] = (40, 250, 250)
    values = statistics.measure(half)
    assert np.isnan(values["hue"]) and values["hue_unity"] < 0.05


def test_composition_is_located():
    patch = flat((60, 60, 60), (224, 224))
    patch[150:190, 30:70] = picture(0, (40, 40))
    values = statistics.measure(patch)
    assert values["detail_height"] == pytest.approx(170 / 224, abs=0.01)
    assert values["detail_side"] == pytest.approx(50 / 224, abs=0.01)
    assert values["centre_focus"] < 0.2 < 0.9 < values["free_space"]
    patch = flat((60, 60, 60), (224, 224))
    patch[65:85, 65:85] = picture(0, (20, 20))
    assert statistics.measure(patch)["thirds"] > 0.9
    bright = flat((50, 50, 50))
    bright[:20, :32] = 200
    values = statistics.measure(bright)
    assert values["light_above"] > 50 and values["light_right"] < -20
    mirrored = np.concatenate([picture(1, (60, 30)), picture(1, (60, 30))[:, ::-1]], 1)
    assert statistics.measure_fitted(mirrored)["symmetry"] == pytest.approx(1, abs=1e-3)
    assert statistics.measure(flat((9, 9, 9), (100, 200)))["format"] == 1


def test_noise_is_estimated_in_grey_levels():
    noise = np.random.default_rng(0).normal(128, 6.0, (224, 224, 1))
    values = statistics.measure_fitted(np.repeat(np.rint(noise), 3, 2).astype(np.uint8))
    assert values["grain"] == pytest.approx(6.0, rel=0.05)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 3), (15, 300), (16, 224), (224, 17)])
def test_the_smallest_pictures_survive(shape):
    for pixels in (picture(0, shape), flat((7, 7, 7), shape)):
        values = statistics.measure(pixels)
        assert set(values) == set(NAMES) and not np.isnan(values["format"])
        assert not any(np.isinf(value) for value in values.values())


def test_size_and_contents_alone_decide():
    pixels = picture(3)
    before = pixels.copy()
    pixels.setflags(write=False)
    one, two = statistics.measure(pixels), statistics.measure(pixels)
    np.testing.assert_array_equal(pixels, before)
    assert one == two and all(isinstance(value, float) for value in one.values())


def test_all_together_are_quick():
    """Side by side with two blurs of the same picture: a ratio, which other work beside the test leaves alone."""
    demo = builders.load("demo")
    pixels = images.fit(demo.pixels(0), ImageRef(0), statistics.SIZE)

    def seconds(work):
        times = []
        for _ in range(30):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return min(times)

    blur = seconds(lambda: scipy.ndimage.gaussian_filter(pixels.astype(np.float64), (8, 8, 0)))
    assert seconds(lambda: statistics.measure_fitted(pixels)) < MOST * blur


def test_what_is_dark_by_itself_is_not_asked_for_its_exposure():
    night, noon = picture(0) // 8, picture(0) // 2
    assert "exposure" in statistics.unfit(statistics.measure(night))
    assert "exposure" not in statistics.unfit(statistics.measure(noon // 3 + 70))
    assert set(statistics.unfit(statistics.measure(picture(0, (1, 300))))) == set(statistics.FIT)  # not measured
    for name, (statistic, lowest, highest) in statistics.FIT.items():
        assert attributes.get(name).absolute and lowest < highest and statistic in NAMES


# --- tenths


def test_tenths_are_equally_full():
    values = np.random.default_rng(0).normal(size=1000)
    edges = statistics.edges(values)
    assert collections.Counter(statistics.decile(value, edges) for value in values) == dict.fromkeys(range(10), 100)
    assert statistics.decile(-1e9, edges) == 0 and statistics.decile(1e9, edges) == 9
    assert statistics.decile(np.nan, edges) is None
    assert statistics.decile(edges[3], edges) == 4  # a value on an edge belongs above


def test_values_that_a_tenth_shares_have_no_tenth():
    values = np.concatenate([np.zeros(55), np.linspace(1, 2, 45)])
    edges = statistics.edges(values)
    assert statistics.decile(0.0, edges) is None
    assert [statistics.decile(value, edges) for value in (1.0, 2.0)] == [5, 9]
    for values in (np.ones(100), np.full(100, np.nan), np.arange(5.0), np.zeros(0)):
        assert np.isnan(statistics.edges(values)).all()
        assert statistics.decile(1.0, statistics.edges(values)) is None


def test_the_edges_of_one_split_serve_another():
    train = {"brightness": np.arange(100.0), "hue": np.linspace(0, 359, 100)}
    edges = statistics.edges_of(train)
    assert statistics.deciles_of({"brightness": np.array([-5.0, 50.0, np.nan]), "hue": np.array([1.0, np.nan, 340.0])},
                                 edges) == [{"brightness": 0, "hue": 0}, {"brightness": 5}, {"hue": 9}]
    np.testing.assert_array_equal(edges["hue"], statistics.get("hue").edges)
    assert statistics.deciles_of({}) == []
    with pytest.raises(ConfigError, match="nearest is 'grain'"):
        statistics.edges_of({"grian": np.zeros(3)})


# --- phrases


def test_names_and_levels():
    assert not set(NAMES) & set(attributes.ATTRIBUTES)  # a label `noise=2` is a grade of an edit
    assert set(statistics_cues.CUES) == set(NAMES) and len(NAMES) >= 12
    assert all(len(statistics.of_level(level)) >= 4 for level in config_lib.LEVELS)
    assert all(name.isidentifier() and statistics.get(name).meaning for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_phrase_is_complete_and_read_back(name):
    statistic = statistics.get(name)
    bank = statistic.cues
    assert len(set(bank.questions)) == len(bank.questions) >= 6
    assert len(bank.words) == len(bank.sentences) == (10 if statistic.circular else 5)
    stated = []
    for level in range(len(bank.words)):
        for text in bank.answers(level):
            assert statistics.said(name, f" {text.upper()} ") == (f"{level}" if statistic.circular else f"level{level}")
            stated.append(text)
    if statistic.circular:
        assert not bank.more and not bank.less and statistics.said(name, "3 of 10.") is None
    else:
        assert len(bank.more) >= 3 and len(bank.less) >= 3 and not set(bank.more) & set(bank.less)
        assert len(bank.more_answers) >= 2 and len(bank.less_answers) >= 2
        for place in range(10):
            assert statistics.said(name, statistics_cues.tenth(place)) == str(place)
        for which in cues.CHOICES:
            assert all(statistics.said(name, text) == which for text in bank.chosen(which))
            stated += bank.chosen(which)
    assert len({cues.normal(text) for text in stated}) == len(stated)
    assert all(text.endswith(".") and "{" not in text for text in stated)
    assert statistics.said(name, "Something else.") is None


def test_no_sentence_serves_two_statistics_or_an_attribute():
    ours = [cues.normal(text) for bank in statistics_cues.CUES.values()
            for text in (*bank.sentences, *bank.more_answers, *bank.less_answers)]
    assert len(set(ours)) == len(ours)
    theirs = {cues.normal(text) for bank in cues.CUES.values()
              for text in (*(phrase for grade in bank.answers for phrase in grade), *bank.more_answers,
                           *bank.less_answers)}
    assert not theirs & set(ours)
    questions = [question for bank in statistics_cues.CUES.values()
                 for question in (*bank.questions, *bank.more, *bank.less)]
    assert len(set(questions)) == len(questions)
    assert len({bank.topic for bank in statistics_cues.CUES.values()}) == len(NAMES)


# --- the task


def labels(turns):
    return [turn.label.replace(":", "=").partition("=")[::2] for turn in turns]


def test_answers_are_the_deciles_of_the_record():
    forms = collections.Counter()
    for seed, record in enumerate(records() * 5):
        shown, turns, target = measured.measured(record, np.random.default_rng(seed), Context(config_lib.PARTS))
        assert shown == (ImageRef(record.image.index),) and target is None  # whole and untouched
        assert 6 <= len(turns) <= 10
        levels = [piece.parts for turn in turns for piece in turn.prompt if isinstance(piece, Mention)]
        assert sorted(levels) == sorted((level,) for level in config_lib.LEVELS)
        current = None
        for turn, (name, truth) in zip(turns, labels(turns), strict=True):
            current = next((piece.parts[0] for piece in turn.prompt if isinstance(piece, Mention)), current)
            assert statistics.get(name).level == current
            assert statistics.said(name, turn.answer.text) == truth
            assert truth in (str(record.deciles[name]), f"level{record.deciles[name] // 2}")
            assert turn.subject == name
            forms[truth.startswith("level")] += 1
        assert len({name for name, _ in labels(turns)}) == len(turns)
    assert 0.3 < forms[True] / forms.total() < 0.7


def test_comparisons_are_at_least_two_tenths_apart():
    many = records()
    rng = np.random.default_rng(0)
    answers = collections.Counter()
    for _ in range(300):
        one, other = (many[i] for i in rng.choice(len(many), 2, replace=False))
        shown, turns, _ = measured.compared(one, other, rng, Context(config_lib.PARTS))
        assert shown == (ImageRef(one.image.index), ImageRef(other.image.index))
        for turn, (name, which) in zip(turns, labels(turns), strict=True):
            pair, bank = (one.deciles[name], other.deciles[name]), statistics.get(name).cues
            assert abs(pair[0] - pair[1]) >= 2
            question = turn.prompt[-1].strip()
            assert (question in bank.more) != (question in bank.less)
            assert which == cues.CHOICES[int(np.argmax(pair) if question in bank.more else np.argmin(pair))]
            assert statistics.said(name, turn.answer.text) == which
            answers[which] += 1
    assert 0.4 < answers["first"] / answers.total() < 0.6
    with pytest.raises(BadRecord, match="less than 2 tenths apart"):
        measured.compared(many[0], many[0], rng, Context(config_lib.PARTS))


def test_only_given_levels_are_asked():
    record = records()[3]
    for parts in (("low",), ("middle", "thematic"), ("low", "high")):
        _, turns, _ = measured.measured(record, np.random.default_rng(0), Context(parts))
        assert {statistics.get(name).level for name, _ in labels(turns)} == set(parts) & set(config_lib.LEVELS)
    with pytest.raises(ConfigError, match="add one to the process"):
        measured.measured(record, np.random.default_rng(0), Context(("thematic",)))


def test_records_without_deciles_are_refused():
    with pytest.raises(BadRecord, match="r1 has no deciles, which the task measured needs"):
        measured.measured(Record("r1", ImageRef(0)), np.random.default_rng(0), Context(config_lib.PARTS))
    with pytest.raises(BadRecord, match="no deciles at the levels middle"):
        measured.measured(Record("r1", ImageRef(0), deciles={"brightness": 3}), np.random.default_rng(0),
                          Context(("middle",)))


def test_a_sample_is_a_function_of_the_seed():
    one, other = records()[3], records()[30]
    for make in (lambda rng: measured.measured(one, rng, Context(config_lib.PARTS)),
                 lambda rng: measured.compared(one, other, rng, Context(config_lib.PARTS))):
        assert make(np.random.default_rng(1)) == make(np.random.default_rng(1)) != make(np.random.default_rng(2))
