"""calm_jax.evaluation.report: one page that stands alone, hides nothing, and survives figures that do not exist."""

import base64
import dataclasses
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from calm_jax import config as config_lib
from calm_jax.data import attributes, builders
from calm_jax.data.samples import Edit, ImageRef
from calm_jax.evaluation import metrics, protocols, report
from calm_jax.evaluation.protocols import Answered

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(html.parser.HTMLParser):
    """Holds what a browser would fetch, the ids, and whether every tag is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.ids, self.open, self.text, self.references = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self._attributes(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._attributes(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def _attributes(self, attrs):
        for name, value in attrs:
            if name in ("src", "srcset", "poster", "data", "action"):
                self.fetched.append(value)
            if name in ("href", "xlink:href"):
                (self.references if value.startswith("#") else self.fetched).append(value)
            if name == "id":
                self.ids.append(value)


def _opinion(task, record, true, text, said=""):
    return Answered(task, task, record.group, record.key, (record.image,), "What do you say?", true, text, said)


@pytest.fixture(scope="module")
def results():
    dataset = builders.load("demo")
    rng = np.random.default_rng(0)
    asked, control, comments, scored = [], [], [], []
    for place, index in enumerate(dataset.indices("test")[::2]):
        record = dataset.record(int(index))
        names = [name for name, attribute in attributes.ATTRIBUTES.items() if attribute.absolute]
        name = names[place % len(names)]
        attribute = attributes.get(name)
        true = attribute.flaws[0]
        image = ImageRef(int(index), record.image.window, (Edit(name, true, 3),))
        for said in (true, attribute.neutral, None):
            text = "<b>nothing</b> & more" if said is None else attribute.cues.answers[said][0]
            asked.append(Answered(name, "grade", record.group, record.key, (image,), attribute.cues.questions[0],
                                  str(true), text, "" if said is None else str(said)))
            control.append(dataclasses.replace(asked[-1], said=str(rng.integers(2))))
        asked.append(Answered(name, "comparison", record.group, record.key, (image, record.image), "Which one?",
                              "first", "The first.", "first" if place % 2 else "second"))
        control.append(asked[-1])
        comments.append(_opinion("comment", record, record.comments[0], record.comments[-1]))
        said = f"{5 + place % 3}.5" if place else ""
        scored.append(_opinion("score", record, f"{record.score:.1f}.", f"{said or 'none'}.", said))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "RESAMPLES", 100)
        tables = {"attributes": (asked, protocols.attribute_table(asked, control)),
                  "commenting": (comments, {"n": len(comments)}), "scoring": (scored, protocols.score_table(scored))}
    return [{"model": f"runs/{task}", "task": task, "dataset": "demo", "split": "test", "reader": "text",
             "table": table, "answers": json.loads(json.dumps([dataclasses.asdict(item) for item in answers]))}
            for task, (answers, table) in tables.items()]


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    folders = {}
    for name, shuffled in (("pretrain", False), ("control", True)):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        processes = {"self_supervised": config_lib.Process(shuffle_labels=shuffled), "generic": config_lib.Process()}
        run = ("self_supervised",) if shuffled else tuple(processes)
        config = config_lib.Config(run=run, processes=processes)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        lines = [{"process": process, "step": step, "kind": "train", "loss": 5 / step, "accuracy": 1 - 1 / step,
                  "lr": 1e-3 / step} for process in run for step in range(1, 30)]
        lines += [{"process": run[0], "step": 29, "kind": "validation", "loss": 0.4, "accuracy": 0.9}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"process": "gener')
    return folders


@pytest.fixture(scope="module")
def text(results, workdirs, tmp_path_factory):
    commands = [report.Command("train <it>", "python -m calm_jax.train --config configs/pretrain.py", 61.0),
                report.Command("not timed", "true")]
    out = report.write(tmp_path_factory.mktemp("page") / "deep" / "report.html", workdirs=workdirs, results=results,
                       title="A page & more", lead="What it is.", notes=("Beware.",), commands=commands, seconds=83.0,
                       truth="composed")
    return out.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_stands_alone(text):
    page = Page(text)
    assert not page.open
    assert len(set(page.ids)) == len(page.ids)
    assert page.references and {reference[1:] for reference in page.references} <= set(page.ids)
    assert page.fetched and all(value.startswith("data:image/") for value in page.fetched)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "<b>nothing" not in text and "&lt;b&gt;nothing" in text


def test_pictures_decode(text):
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    assert len(pictures) == 2 * report.CARDS + 2 * report.PAIRS
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture, validate=True)))
        image.load()
        assert image.size[0] == image.size[1] >= report.SHARP


def test_every_attribute_of_the_table_is_shown(text, results):
    rows = re.findall(r"<tr class=\"(above|below|)\">\s*<td title=\"[^\"]*\">(\w+)", text)
    assert len(rows) == len(results[0]["table"])
    assert {name for _, name in rows} == {row["subject"] for row in results[0]["table"]}
    assert {verdict for verdict, _ in rows} > {"below"}, "those that fail stand there too"
    assert "two-stage bootstrap" in text and "▼" in text


def test_figures_notes_and_commands_are_on_the_page(text):
    shown = "".join(Page(text).text)
    for piece in ("A page & more", "What it is.", "Beware.", "python -m calm_jax.train --config configs/pretrain.py",
                  "61 s", "83 s for all", "train <it>", "PLCC", "parse failures", "control: validation", "calm_jax 0",
                  "generic"):
        assert piece in shown, piece


def test_the_control_is_no_panel_of_its_own(workdirs):
    runs = [report._Run(name, folder) for name, folder in workdirs.items()]
    panels = report.curves(runs)
    assert [(panel["run"], panel["process"], panel["controlled"]) for panel in panels] == [
        ("pretrain", "self_supervised", True), ("pretrain", "generic", False)]


def test_figures_that_do_not_exist_break_nothing(results, tmp_path):
    nan, infinity = float("nan"), float("inf")
    table = [{**row, "accuracy": None, "gain": nan, "gain_interval": [None, infinity], "control_gain": -infinity,
              "control_gain_interval": [nan, nan]} for row in results[0]["table"]]
    for name in ("elsewhere", "elsewhere_gain", "elsewhere_gain_interval"):  # of one photograph alone
        table[0].pop(name, None)
    broken = [{**results[0], "table": table},
              {**results[2], "table": {"n": 36, "parse_failures": 1.0, "plcc": None, "srcc": nan, "mae": None},
               "answers": [answer | {"said": "", "text": ""} for answer in results[2]["answers"]]}]
    line = '{"process": "p", "step": 1, "kind": "train", "loss": NaN, "lr": Infinity}'
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    out = report.write(tmp_path / "report.html", workdirs={"lost": tmp_path, "absent": tmp_path / "no"},
                       results=broken, title="Nothing exists")
    text = out.read_text(encoding="utf-8")
    assert not Page(text).open
    shown = "".join(Page(re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)).text)
    assert not re.search(r"\b(nan|inf|None|null)\b", shown)


def test_a_page_of_nothing(tmp_path):
    assert not Page(report.write(tmp_path / "r.html", workdirs={}, results=[], title="Empty").read_text()).open


def test_spread_takes_even_distances():
    assert report.spread(range(72), 12) == [0, 6, 13, 19, 26, 32, 39, 45, 52, 58, 65, 71]
    assert report.spread([1, 2], 12) == [1, 2]


def test_named_counts_known_phrasings_in_the_right_grade():
    edits = [{"attribute": "noise", "grade": 2, "seed": 1}, {"attribute": "tint", "grade": 0, "seed": 1}]
    noise, tint = (attributes.get(name).cues for name in ("noise", "tint"))
    comment = {"images": [{"index": 0, "window": None, "edits": edits}],
               "text": f"A cat. {noise.answers[2][0]} {tint.answers[2][1]} {noise.answers[0][0]}"}
    hit, missed, invented = report.named(comment)
    assert [edit.attribute for edit in hit] == ["noise"] and [edit.attribute for edit in missed] == ["tint"]
    assert invented == [Edit("tint", 2)]


def test_words():
    assert report.figure(-0.25, "+.2f") == "−0.25" and report.figure([0.1, math.nan]) == "[0.100, –]"
    assert report.percent(0.5) == "50" and report.percent(None) == "–"
    assert report.duration(61.2) == "61 s" and report.duration(750.0) == "12 min 30 s"


def test_comments_are_judged_on_other_photographs_too():
    said = {name: attributes.get(name).cues.answers[grade][0] for name, grade in (("exposure", 0), ("noise", 2))}

    def answer(group, edits, *names):
        return {"group": group, "text": " ".join(["A cat.", *(said[name] for name in names)]),
                "images": [{"index": 0, "window": None, "edits": [dataclasses.asdict(edit) for edit in edits]}]}

    dark, noisy = Edit("exposure", 0, 1), Edit("noise", 2, 1)
    result = {"answers": [answer("cat", (dark,), "exposure"), answer("cat", (dark, noisy), "exposure", "noise"),
                          answer("cup", (noisy,), "exposure")]}
    figures = report.comments_in_figures(result)
    # Of the four flaws three are named. The cup's comment names both of the cat's dark pictures, one of the cat's
    # two comments names the noise of the cup.
    assert figures == {"done": 4, "hit": 3, "invented": 1, "n": 3, "distinct": 2, "elsewhere": 2.5}
    assert report.comments_in_figures({"answers": result["answers"][:2]})["elsewhere"] is None
    assert report.comments_in_figures(None) is None
