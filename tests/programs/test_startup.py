"""The start of a training run is reported, a second one takes its programs from the cache, and steps can be traced."""

from __future__ import annotations

import re

import jax
import miniature
import pytest
from jax.experimental.compilation_cache import compilation_cache

from calm_jax.commands import train as program
from calm_jax.training import startup

CACHE = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}


@pytest.fixture
def cache(tmp_path):
    settings = CACHE | {"jax_compilation_cache_dir": str(tmp_path / "compiled")}
    before = {name: jax.config.values[name] for name in settings}

    def use(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jax.clear_caches()

    use(settings)
    yield tmp_path / "compiled"
    use(before)


@pytest.mark.slow
def test_a_second_start_compiles_nothing_anew_and_a_trace_is_written(cache, tmp_path, capfd):
    config = miniature.config(processes={"only": miniature.process(steps=8, eval_every=0)})

    def start(name):
        program.train(config, tmp_path / name, startup=startup.Startup(), profile=2)
        said = capfd.readouterr().err
        assert "only: steps 6 to 7 are traced in" in said
        found = re.search(r"first step after ([\d.]+) s \((.*)\); ([\d.]+) s of it for programs: (\d+) compiled, "
                          r"(\d+) from the cache (\S+)", said)
        assert found is not None, said
        phases = dict(phase.rsplit(" ", 1) for phase in found[2].split(", "))
        assert list(phases) == ["imports", "parameters", "first batch", "first step"]
        assert sum(map(float, phases.values())) == pytest.approx(float(found[1]), abs=0.3)
        assert found[6] == str(cache) and float(found[3]) <= float(found[1])
        assert said.count("start-up:") == 1
        return int(found[4]), int(found[5])

    compiled, known = start("one")
    assert compiled > 0 and known == 0
    jax.clear_caches()
    again, known = start("two")
    assert again == 0 and known == compiled
    assert list((tmp_path / "two" / "profile" / "only").rglob("*.xplane.pb"))


def test_a_trace_of_a_run_with_fewer_steps_is_ended(tmp_path):
    from calm_jax.training.logging import Trace
    trace = Trace(tmp_path, 3, 2)
    for step in (1, 2, 3):
        trace.before(step)
        assert not trace.after(step, ())
    trace.close()
    assert list(tmp_path.rglob("*.xplane.pb"))
    trace.close()  # again: nothing runs
    none = Trace(tmp_path / "none", 0, 2)
    none.before(2)
    none.close()
    assert not (tmp_path / "none").exists()


def test_programs_are_kept_where_the_user_says_or_in_the_cache_folder(monkeypatch, tmp_path):
    before, least = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
        startup.keep_programs()
        assert jax.config.jax_compilation_cache_dir == before  # JAX reads the variables itself
        assert jax.config.jax_persistent_cache_min_compile_time_secs == least
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        startup.keep_programs()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "calm_jax")
        assert jax.config.jax_persistent_cache_min_compile_time_secs == startup.QUICK
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
