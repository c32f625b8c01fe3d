"""Damaged and hostile files of every kind: each reader uses them or says one sentence, in bounded memory, in place."""

import json
import sys

import hostile
import miniature
import pytest

FAST = 126  # items: seven of a kind
EVERY = 720
PEAK = 2 << 30  # bytes; measured: 0.7 GiB for a hundred items, most of which is JAX, torch and what they load


def test_damaged_and_hostile_files_are_used_or_are_one_sentence(tmp_path):
    pytest.importorskip("torch", reason="torch is not here, and .bin files are read with it; make test has it")
    failures, counts = hostile.run(hostile.items(FAST), tmp_path)
    assert not failures, "\n".join(f"{failure.item}: {failure.what}" for failure in failures)
    assert sum(counts.values()) == FAST and len({name.split()[0] for name in counts}) == len(hostile.kinds())


@pytest.mark.slow
def test_a_corpus_of_many_hundreds_takes_little_memory(tmp_path):
    pytest.importorskip("torch", reason="torch is not here, and .bin files are read with it; make test has it")
    done = miniature.run([sys.executable, "tests/hostile.py", str(EVERY)], miniature.environment(), timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert not result["failures"] and result["items"] == EVERY
    assert result["peak_bytes"] < PEAK
