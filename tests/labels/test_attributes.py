"""calm_jax.data.attributes: every grade moves an independent measurement its way, and every phrase is read back."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from calm_jax import config as config_lib
from calm_jax.data import attributes, builders, cues, images
from calm_jax.data.samples import Edit, ImageRef
from calm_jax.errors import ConfigError

NAMES = tuple(attributes.ATTRIBUTES)
SIZES = (96, 336)


@pytest.fixture(scope="module")
def photographs() -> dict[int, list[np.ndarray]]:
    """The nine demo photographs, fitted to each size; the picture of deep space comes apart, as the last."""
    demo = builders.load("demo")
    firsts = {photograph.name: next(i for i in range(len(demo)) if demo.record(i).key.startswith(photograph.name))
              for photograph in demo.photographs}
    order = sorted(firsts, key=lambda name: name == "hubble")
    return {size: [images.fit(demo.pixels(firsts[name]), ImageRef(0), size) for name in order] for size in SIZES}


def grey(pixels):
    return pixels.astype(np.float64) @ (0.299, 0.587, 0.114)


def gradient_energy(pixels):
    return np.mean([np.square(np.diff(grey(pixels), axis=axis)).mean() for axis in (0, 1)])


def noise_level(pixels):
    """Immerkaer's estimate: a Laplacian difference that cancels linear structure."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    return np.median(np.abs(ndimage.convolve(grey(pixels), kernel)))


def blockiness(pixels):
    """Steps across the lines of the 8 x 8 grid, relative to those beside them."""
    steps = np.abs(np.diff(grey(pixels), axis=1)).mean(0)
    on = np.arange(len(steps)) % 8 == 7
    return steps[on].mean() / (steps[~on].mean() + 0.1)


def contrast(pixels):
    return grey(pixels).std()


def mean(pixels):
    return grey(pixels).mean()


def colourfulness(pixels):
    signed = pixels.astype(np.float64)
    return (signed.max(-1) - signed.min(-1)).mean()


def warmth(pixels):
    red, _, blue = pixels.reshape(-1, 3).mean(0)
    return (red - blue) / (red + blue)


def greenness(pixels):
    red, green, blue = pixels.reshape(-1, 3).mean(0)
    return green / (red + green + blue)


def corner_darkness(pixels):
    height, width = pixels.shape[0] // 6, pixels.shape[1] // 6
    rows, columns = (slice(None, height), slice(-height, None)), (slice(None, width), slice(-width, None))
    corners = np.mean([mean(pixels[row, column]) for row in rows for column in columns])
    return -corners / mean(pixels[2 * height:-2 * height, 2 * width:-2 * width])


# attribute -> what rises with the grade, or falls where the sign is -1
MEASURES = {
    "sharpness": (gradient_energy, -1), "noise": (noise_level, 1), "compression": (blockiness, 1),
    "exposure": (mean, 1), "contrast": (contrast, 1), "saturation": (colourfulness, 1), "temperature": (warmth, 1),
    "tint": (greenness, 1), "vignetting": (corner_darkness, 1),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MEASURES)
def test_grades_move_their_measurement_in_order(photographs, name, size):
    measure, sign = MEASURES[name]
    attribute = attributes.get(name)
    answerable = [picture for picture in photographs[size][:-1] if name not in attributes.unanswerable(picture)]
    assert len(answerable) >= 8
    for picture in answerable:
        # Whatever the seed: the weakest version of a grade lies above the strongest of the grade below.
        values = [[sign * measure(attributes.apply(picture, Edit(name, grade, seed))) for seed in range(3)]
                  for grade in range(len(attribute.grades))]
        for below, above in itertools.pairwise(values):
            assert max(below) < min(above), values


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_is_visible_repeatable_and_varied(photographs, name):
    attribute = attributes.get(name)
    for picture in photographs[96][:-1]:
        if name in attributes.unanswerable(picture):
            continue
        for grade in attribute.flaws:
            edited = attributes.apply(picture, Edit(name, grade, 7))
            assert edited.shape == picture.shape and edited.dtype == np.uint8
            np.testing.assert_array_equal(edited, attributes.apply(picture, Edit(name, grade, 7)))
            if name != "saturation" and not (name == "sharpness" and grade == 1):
                assert not attributes.is_noop(picture, edited, Edit(name, grade, 7))
            if name != "orientation" and (name, grade) != ("saturation", 0):
                assert any((edited != attributes.apply(picture, Edit(name, grade, seed))).any() for seed in range(5))
        np.testing.assert_array_equal(picture, attributes.apply(picture, Edit(name, attribute.neutral, 7)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 96), (96, 1), (2, 3), (1, 1)])
def test_the_smallest_pictures_survive(name, shape):
    picture = np.full((*shape, 3), 100, np.uint8)
    for grade in attributes.get(name).flaws:
        assert attributes.apply(picture, Edit(name, grade)).shape == picture.shape


def test_left_is_left_and_wide_is_wide():
    line = np.zeros((90, 90, 3), np.uint8)
    line[:, 44:46] = 255
    top = [np.argmax(attributes.apply(line, Edit("tilt", grade))[15, :, 0]) for grade in range(3)]
    assert top[0] < top[1] < top[2]
    disc = np.zeros((90, 90, 3), np.uint8)
    y, x = np.mgrid[-45:45, -45:45]
    disc[y * y + x * x < 400] = 255
    shapes = [attributes.apply(disc, Edit("aspect", grade))[..., 0] > 127 for grade in range(3)]
    ratios = [shape.any(0).sum() / shape.any(1).sum() for shape in shapes]
    assert ratios[0] < 0.8 < 0.95 < ratios[1] < 1.05 < 1.25 < ratios[2]
    areas = [(attributes.apply(disc, Edit("framing", grade))[..., 0] > 127).sum() for grade in range(3)]
    assert areas[0] * 1.4 < areas[1] < areas[2] / 1.4


def test_grey_pictures_have_no_saturation_to_lose(photographs):
    picture = photographs[96][0]
    colourless = attributes.apply(picture, Edit("saturation", 0))
    pale = Edit("saturation", 1)
    assert attributes.is_noop(colourless, attributes.apply(colourless, pale), pale)
    assert attributes.unanswerable(colourless) == {"saturation"}
    assert not attributes.unanswerable(picture)


@pytest.mark.parametrize("name", NAMES)
def test_every_phrase_is_read_back(name):
    bank = attributes.get(name).cues
    for grade, phrases in enumerate(bank.answers):
        for phrase in phrases:
            assert attributes.grade_of(name, phrase) == grade
            assert attributes.grade_of(name, f"  {phrase.upper().rstrip('.')} ") == grade
    for template in bank.more_answers + bank.less_answers:
        for which, phrase in zip(cues.CHOICES, cues.variations(template), strict=True):
            assert attributes.choice_of(name, phrase) == which
    assert attributes.grade_of(name, "Something else.") is None
    assert attributes.choice_of(name, "Something else.") is None


@pytest.mark.parametrize("name", NAMES)
def test_the_bank_is_complete_and_ambiguous_nowhere(name):
    attribute = attributes.get(name)
    bank = attribute.cues
    assert len(bank.answers) == len(attribute.grades) == len(attribute.penalty)
    assert attribute.penalty[attribute.neutral] == 0 and all(attribute.penalty[grade] > 0 for grade in attribute.flaws)
    assert not set(bank.more) & set(bank.less)
    assert set(bank.advice) == set(attribute.flaws)
    sentences = [phrase for phrases in bank.answers for phrase in phrases]
    sentences += [text for template in bank.more_answers + bank.less_answers for text in cues.variations(template)]
    assert len({cues.normal(sentence) for sentence in sentences}) == len(sentences)
    assert all(sentence.endswith(".") for sentence in sentences)
    assert all("{" not in sentence for sentence in sentences)


def test_no_answer_serves_two_attributes():
    phrases = [cues.normal(phrase) for bank in cues.CUES.values() for grade in bank.answers for phrase in grade]
    assert len(set(phrases)) == len(phrases)


def test_all_levels_are_served():
    assert len(attributes.of_level("low")) >= 5
    for level in config_lib.LEVELS:
        assert len(attributes.of_level(level)) >= 3
        assert sum(attribute.absolute for attribute in attributes.of_level(level)) >= 3
    assert set(cues.CUES) == set(attributes.ATTRIBUTES)


def test_the_rules_name_attributes_and_hold():
    for pair in attributes.NOT_TOGETHER:
        assert len(pair) == 2 and pair <= set(NAMES)
        assert not attributes.together(pair)
    for edited, hidden in attributes.NOT_ASKED.items():
        assert edited in NAMES and set(hidden) <= set(NAMES) - {edited}
    assert attributes.together(("sharpness", "contrast"))
    assert not attributes.consistent({"exposure": 2, "saturation": 2})
    assert attributes.consistent({"exposure": 1, "saturation": 2})


def test_edits_are_ordered_light_before_sensor_before_file():
    edits = [Edit(name, 0) for name in ("compression", "noise", "contrast", "sharpness", "tilt")]
    assert [edit.attribute for edit in attributes.ordered(edits)] == ["tilt", "sharpness", "contrast", "noise",
                                                                      "compression"]


def test_unknown_names_and_grades_are_refused():
    picture = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ConfigError, match="nearest is 'noise'"):
        attributes.apply(picture, Edit("noize", 1))
    with pytest.raises(ConfigError, match="grades 0 to 2"):
        attributes.apply(picture, Edit("noise", 3))
