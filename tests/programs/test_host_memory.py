"""A computing command starts itself again with malloc's settings, once, as the same process; others do not."""

from __future__ import annotations

import json
import os
import sys

import miniature
import pytest

from calm_jax import host_memory

# Shows what a program would be after `settle`: its process, its arguments, its environment.
SHOWN = ("import json, os, sys; print(os.getpid()); from calm_jax import cli, guard; "
         "guard.run = lambda work: print(json.dumps([os.getpid(), sys.argv, os.environ.get('GLIBC_TUNABLES', '')])); "
         "cli.main(*{words})")
glibc = pytest.mark.skipif(not host_memory.settings({}), reason="no glibc, or an accelerator")


def shown(words: list[str], *arguments: str, **variables: str):
    base = {name: value for name, value in miniature.environment().items() if name != host_memory.VARIABLE}
    done = miniature.run([sys.executable, "-c", SHOWN.format(words=words), *arguments], base | variables)
    *pids, last = done.stdout.splitlines()
    return pids, json.loads(last)


@glibc
def test_a_computing_command_starts_again_with_the_same_arguments():
    pids, (pid, arguments, tunables) = shown(["train"], "--config", "a b", "")
    assert pids == [str(pid)] * 2  # twice begun, in one process
    assert arguments == ["-c", "--config", "a b", ""]
    assert tunables == "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize("words", [["plan"], ["supervise"], ["train", "--help"], []])
def test_others_do_not(words):
    pids, (_, _, tunables) = shown(words)
    assert len(pids) == 1 and tunables == ""


def test_settings_of_the_user_stay():
    given = "glibc.malloc.tcache_count=3"
    pids, (_, _, tunables) = shown(["score"], GLIBC_TUNABLES=given)
    assert len(pids) == 1 and tunables == given


@glibc
def test_settings_of_other_libraries_are_kept():
    given = {host_memory.VARIABLE: "glibc.pthread.rseq=1"}
    assert host_memory.settings(given)[host_memory.VARIABLE] == "glibc.pthread.rseq=1:glibc.malloc.hugetlb=1"


def test_nothing_changes_beside_an_accelerator_or_without_glibc(tmp_path, monkeypatch):
    (tmp_path / "accel0").touch()
    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "ACCELERATORS", (str(tmp_path / "accel*"),))
        assert host_memory.settings({}) == {}

    def missing(name):
        raise ValueError(name)

    monkeypatch.setattr(os, "confstr", missing)
    assert host_memory.settings({}) == {}
