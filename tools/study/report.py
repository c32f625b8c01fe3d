"""Results of arms and the true scores in; figures with intervals, tables by question and plots, out."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from calm_jax import config as config_lib
from calm_jax import files
from calm_jax.data import pipeline
from calm_jax.data.scale import mapped
from calm_jax.evaluation import metrics
from tools.study import arms, judge
from tools.study import baselines as baselines_lib
from tools.study.runner import Job, Study

METHODS = {"ridge": baselines_lib.linear, "kernel ridge": baselines_lib.kernel}
FIGURES = {"PLCC": metrics.plcc, "SRCC": metrics.srcc}


@functools.cache
def truth(study: Study, split: str) -> Float[np.ndarray, "n"]:
    """True scores on the scale 1-10."""
    records = [study.dataset.record(int(index)) for index in study.dataset.indices(split)]
    return np.asarray([mapped(record.score, record.scale) for record in records])


def baselines(study: Study) -> dict[str, dict[str, list[float]]]:
    """method -> number of scores -> what it says of the photographs that judge; kept in the workdir."""
    file = study.workdir / f"baselines-{study.split}-{study.dataset.fingerprint}.json"
    if file.is_file():
        return json.loads(file.read_text())
    train, asked = (judge.pooled(study.start, study.dataset, split) for split in ("train", study.split))
    place = {int(index): number for number, index in enumerate(study.dataset.indices("train"))}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in METHODS}
    for count in arms.STEPS:
        known = [place[int(index)] for index in pipeline.shared(
            study.dataset.indices("train"), count / arms.RECORDS, config_lib.Config().seed)]
        for name, method in METHODS.items():
            said = method(train[known], truth(study, "train")[known], asked)
            found[name][str(count)] = np.round(said, 3).tolist()
    files.write(file, json.dumps(found))
    return found


def said(study: Study, job: Job, reader: str = "light") -> Float[np.ndarray, "n"] | None:
    """What an arm says of the photographs that judge, in their order; None where it was not trained."""
    found = study.known(job)
    if found is None or reader not in found["said"]:
        return None
    values = found["said"][reader]
    return np.asarray([values[study.dataset.record(int(index)).key] for index in study.dataset.indices(study.split)])


def figure(values: Sequence[Float[np.ndarray, "n"]], true: Float[np.ndarray, "n"], name: str) -> str:
    """A correlation as its mean over seeds, with the interval over photographs of that mean."""
    measure = FIGURES[name]

    def mean(places):
        return float(np.mean([measure(one[places], true[places]) for one in values]))

    low, high = metrics.interval(mean, [str(number) for number in range(len(true))])
    return f"{mean(np.arange(len(true))):.3f} [{low:.3f}, {high:.3f}]"


def gain(mine: Sequence[Float[np.ndarray, "n"]], others: Sequence[Float[np.ndarray, "n"]],
         true: Float[np.ndarray, "n"], name: str) -> str:
    """The difference of two correlations, means over seeds, with its paired interval over photographs."""
    measure = FIGURES[name]

    def difference(places):
        ours, theirs = (np.mean([measure(one[places], true[places]) for one in several]) for several in (mine, others))
        return float(ours - theirs)

    low, high = metrics.interval(difference, [str(number) for number in range(len(true))])
    return f"{difference(np.arange(len(true))):+.3f} [{low:+.3f}, {high:+.3f}]"


def line(study: Study, job: Job) -> str:
    """A result in a few words."""
    values = said(study, job)
    if values is None:
        return "others begin from it"
    true = truth(study, study.split)
    return (f"PLCC {metrics.plcc(values, true):.3f}, SRCC {metrics.srcc(values, true):.3f}, "
            f"MAE {np.abs(values - true).mean():.3f}")


def _all(study: Study, name: str) -> list[Float[np.ndarray, "n"]]:
    """What is known of an arm, seed by seed."""
    found = (said(study, Job(name, seed)) for seed in arms.get(name).seeds)
    return [values for values in found if values is not None]


def write(study: Study) -> str:
    """Tables of all questions as Markdown, also in WORKDIR/study.md beside the plot."""
    true, known = truth(study, study.split), {name: _all(study, name) for name in arms.ARMS}
    lines = [f"Judged by {len(true)} photographs of PARA ({study.split}); intervals over photographs, of the mean over "
             "seeds.", ""]
    for question in dict.fromkeys(arm.question for arm in arms.ARMS.values()):
        rows = [name for name, arm in arms.ARMS.items() if arm.question == question and known[name]]
        if not rows:
            continue
        lines += [f"### {question}", "", "| arm | | seeds | minutes each | PLCC | SRCC | MAE |", "|---" * 7 + "|"]
        for name in rows:
            arm, values = arms.get(name), known[name]
            minutes = [study.known(Job(name, seed)) for seed in arm.seeds]
            spent = np.mean([one["minutes"] for one in minutes if one])
            error = np.mean([np.abs(one - true).mean() for one in values])
            lines.append(f"| {name} | {arm.title} | {len(values)} | {spent:.1f} | {figure(values, true, 'PLCC')} | "
                         f"{figure(values, true, 'SRCC')} | {error:.3f} |")
        if question == arms.SCORING:
            for method, by_count in baselines(study).items():
                for count, answers in by_count.items():
                    one = [np.asarray(answers)]
                    lines.append(f"| {method} | {count} scores, statistics of the frozen features | 1 | | "
                                 f"{figure(one, true, 'PLCC')} | {figure(one, true, 'SRCC')} | "
                                 f"{np.abs(one[0] - true).mean():.3f} |")
        lines += _differences(question, known, true)
        lines.append("")
    _draw(study, known, true)
    files.write(study.workdir / "study.md", "\n".join(lines))
    return "\n".join(lines)


COMPARED = {arms.TEACHING: [(f"{start}-{count}", f"scores-{count}") for count in (750, 7_500)
                            for start in ("edits", "shuffled")],
            arms.LEVELS: [(name, "scores-2500") for name, arm in arms.ARMS.items() if arm.question == arms.LEVELS]}


def _differences(question: str, known: Mapping[str, list], true: Float[np.ndarray, "n"]) -> list[str]:
    pairs = [pair for pair in COMPARED.get(question, ()) if known[pair[0]] and known[pair[1]]]
    if not pairs:
        return []
    return ["", "| | PLCC | SRCC |", "|---|---|---|", *(
        f"| {mine} less {other} | {gain(known[mine], known[other], true, 'PLCC')} | "
        f"{gain(known[mine], known[other], true, 'SRCC')} |" for mine, other in pairs)]


def _draw(study: Study, known: Mapping[str, list], true: Float[np.ndarray, "n"]) -> None:
    """Correlation over the number of scores, beside the baselines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    sheet = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(sheet)
    for axes, (name, measure) in zip(sheet.subplots(1, 2), FIGURES.items(), strict=True):
        learned = {count: known[f"scores-{count}"] for count in arms.STEPS if known[f"scores-{count}"]}
        for count, values in learned.items():
            axes.plot([count] * len(values), [measure(one, true) for one in values], "o", color="C0", alpha=0.4,
                      markersize=4)
        axes.plot(list(learned), [np.mean([measure(one, true) for one in values]) for values in learned.values()],
                  color="C0", label="MFAM and light head")
        for place, (method, by_count) in enumerate(baselines(study).items(), 1):
            axes.plot([int(count) for count in by_count], [measure(np.asarray(one), true) for one in by_count.values()],
                      "s--", color=f"C{place}", markersize=4, label=method)
        axes.set(xscale="log", xlabel="scores learned from", ylabel=name, xticks=list(arms.STEPS),
                 xticklabels=[f"{count:,}" for count in arms.STEPS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    picture = io.BytesIO()
    sheet.savefig(picture, format="png", dpi=110)
    files.write(study.workdir / "study.png", picture.getvalue())


