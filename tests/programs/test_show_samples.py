"""tools.show_samples: the page shows what is learned from, what is masked, and how the mixture is composed."""

import re
import subprocess
import sys

import miniature
import pytest

from calm_jax import config as config_lib
from calm_jax.commands import samples as show_samples
from calm_jax.data import attributes, images
from calm_jax.errors import ConfigError


def config(**changes):
    row = config_lib.Row(tokens=384, images=3, answers=160, candidates=4)
    process = miniature.process(tasks={"attributes": 3.0, "score": 1.0}, parts=config_lib.PARTS, row=row, **changes)
    return miniature.config(processes={"only": process})


def test_the_page_marks_what_is_learned_and_counts_the_mixture():
    text = show_samples.page(config(score_spread=0.7), "only", split="train", shown=4, title="a config")
    assert text.count("<h2>Row") == 4 and "data:image/jpeg;base64," in text
    learned = re.findall(r'<span\s+class="tok learn"[^>]*>([^<]*)', text)
    assert any(answer.strip().startswith(("None.", "Clean.", "Right.", "Sharp.", "Low.")) for answer in learned)
    assert re.search(r'class="tok learn" title="\d 0\.\d\d  \d 0\.\d\d', text)  # soft digits
    assert "picture 1: low (2)" in text and "USER:" in text
    shares = [float(share) for share in re.findall(r'class="n">([\d.]+) %</td>', text)]
    assert len(shares) == 2 and sum(shares) == pytest.approx(100, abs=0.2) and 65 < shares[0] < 85
    edits = re.findall(r"record \d+ \u00b7 (\w+): (\w[\w ]*)", text)
    assert edits and all(grade in attributes.get(name).grades for name, grade in edits)


def test_what_cannot_be_seen_is_struck_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(images.attributes, "is_noop", lambda before, after, edit: True)
    text = show_samples.page(config(), "only", split="train", shown=4, title="a config")
    assert 'class="tok masked"' in text and "changes nothing visible here" in text


def test_a_wrong_process_is_named_and_the_program_runs(tmp_path):
    with pytest.raises(ConfigError, match="no process 'onyl'; the nearest is 'only'"):
        show_samples.page(config(), "onyl", split="train", shown=1, title="")
    out = tmp_path / "page.html"
    done = subprocess.run([sys.executable, "-m", "tools.show_samples", "--config", "configs/finetune.py", "--process",
                           "scores", "--rows", "1", "--out", str(out)], cwd=miniature.ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0 and f"samples: {out}" in done.stdout, done.stderr
    assert "What the process <em>scores</em> learns from" in out.read_text()
