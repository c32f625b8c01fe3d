"""What programs write: nothing of the user's is overwritten, names survive, and every failure is a sentence."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import miniature
import numpy as np
import pytest
from PIL import Image

from calm_jax import config as config_lib
from calm_jax import files, guard, terminal
from calm_jax.commands.predict.gather import gather
from calm_jax.commands.predict.journal import Journal
from calm_jax.errors import ConfigError
from calm_jax.inference.once import once


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return miniature.saved(tmp_path_factory.mktemp("run"), config_lib.PARTS)


@pytest.fixture
def photos(tmp_path):
    """Three pictures: one name is no UTF-8, one would clear the screen."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate((b"a.png", b"caf\xe9.png", b"\x1b[2J\x07b.png")):
        rng = np.random.default_rng(number)
        place = os.fsdecode(os.fsencode(folder) + b"/" + name)
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(place)
    return folder


def calm(*words, env=None, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "calm_jax", *map(os.fspath, words)], cwd=miniature.ROOT,
                          timeout=600, env={**miniature.environment(), **(env or {})},
                          **{"capture_output": True, **options})


def refused(done: subprocess.CompletedProcess, *names: object) -> None:
    """One sentence that names these, and an exit code that says so."""
    said = done.stderr.decode(errors="replace")
    assert done.returncode in (1, 2), said
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said, said
    assert all(str(name) in said for name in names), said


# ---- before the work begins -------------------------------------------------------------------------------------


def test_no_file_of_the_users_is_taken_for_the_results(photos, tmp_path):
    """None of these starts JAX."""
    (tmp_path / "mine.csv").write_text("my own table\n")
    (tmp_path / "journalled.csv.journal").mkdir()
    Image.open(photos / "a.png").save(tmp_path / "no-suffix", "PNG")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words, name in (
            (("--out", photos / "a.png", photos), "a.png"), ((photos, "--out", tmp_path / "new.jpg"), "new.jpg"),
            ((photos, "--out", tmp_path / "no-suffix"), "no-suffix"),
            ((photos, "--out", tmp_path / "mine.csv"), "mine.csv"),
            ((photos, "--out", tmp_path), str(tmp_path)), ((photos, "--out", photos / "a.png" / "x.csv"), "a.png"),
            ((photos, "--out", tmp_path / "journalled.csv"), "journalled.csv.journal"),
            ((photos, "--copy-to", tmp_path / "mine.csv"), "mine.csv"),
            ((photos, "--copy-to", tmp_path / "mine.csv" / "best"), "mine.csv")):
        refused(calm("score", *words, "--checkpoint", tmp_path / "none"), name)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_what_this_program_wrote_may_be_written_again_and_nothing_else(tmp_path):
    for name, content, ours in (("page.html", b"<!doctype html><p>mine", files.page),
                                ("page.html", b"<!doctype html>" + files.MARK, files.page),
                                ("plan.json", b'{"fits": 1}', files.json_with("fits", "jax")),
                                ("plan.json", b'{"fits": 1, "jax": 2}', files.json_with("fits", "jax")),
                                ("page.md", b"\xff\xfe#", files.text), ("page.md", b"# Benchmarks", files.text)):
        file = tmp_path / name
        file.write_bytes(content)
        try:
            assert files.output(file, ours=ours) == file
            refuses = False
        except ConfigError as error:
            assert name in str(error)
            refuses = True
        assert refuses == (content in (b"<!doctype html><p>mine", b'{"fits": 1}', b"\xff\xfe#"))
        assert file.read_bytes() == content
    (tmp_path / "page.html").write_bytes(b"mine")
    (tmp_path / "mine.json").write_text("[]")
    for module, words, name in (
            ("tools.show_samples", ("--config", "configs/pretrain.py:tiny", "--out"), "page.html"),
            ("tools.plan", ("--config", "configs/pretrain.py:tiny", "--topology", "cpu:1", "--out"), "mine.json"),
            ("tools.bench", ("train", "--config", "configs/pretrain.py:tiny", "--out"), "mine.json"),
            ("tools.bench.pack", ("--out",), "mine.json"), ("tools.demo", ("--workdir",), "mine.json"),
            ("tools.tokenizer", ("--out",), "mine.json")):
        refused(subprocess.run([sys.executable, "-m", module, *words, str(tmp_path / name)], cwd=miniature.ROOT,
                               capture_output=True, env=miniature.environment()), name)
    assert (tmp_path / "page.html").read_bytes() == b"mine" and (tmp_path / "mine.json").read_text() == "[]"


def test_a_folder_is_whole_or_not_there_and_one_writers_alone(tmp_path):
    place, mine = tmp_path / "out[1]", tmp_path / "out[1].mine.partial"
    mine.mkdir()
    with pytest.raises(ValueError), files.whole_folder(place) as partial:
        (partial / "file").write_text("half")
        raise ValueError
    code = "import os, sys; from calm_jax import files\nwith files.whole_folder(sys.argv[1]): os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(place)], cwd=miniature.ROOT, check=True)
    assert len(list(tmp_path.iterdir())) == 3  # what was killed, and its lock
    with files.whole_folder(place) as first:
        (first / "file").write_text("first")
        with pytest.raises(ValueError), files.whole_folder(place):
            raise ValueError
    assert (place / "file").read_text() == "first" and sorted(tmp_path.iterdir()) == [place, mine]
    with pytest.raises(OSError), files.whole_folder(place):
        pass
    assert (place / "file").read_text() == "first" and sorted(tmp_path.iterdir()) == [place, mine]


def test_pictures_that_the_program_made_are_not_looked_at(tmp_path):
    for name in ("one.jpg", "best/two.jpg", "bestial/three.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(place):
        return [pathlib.Path(path).stem for path in gather([str(place)], io.StringIO(), [str(tmp_path / "best")])]

    assert found(tmp_path) == ["one", "three"] and sorted(found(tmp_path / "**" / "*.jpg")) == ["one", "three"]
    assert found(tmp_path / "best") == found(tmp_path / "best" / "*.jpg") == found(tmp_path / "best/two.jpg") == ["two"]


def test_a_closed_standard_output_is_said_before_the_work(photos, tmp_path):
    command = [sys.executable, "-m", "calm_jax", "score", str(photos), "--checkpoint", str(tmp_path / "none")]
    refused(subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], cwd=miniature.ROOT, capture_output=True,
                           env=miniature.environment()), "standard output", "--out")


def test_a_folder_that_is_a_file_is_said_by_every_program(photos, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for module, words in (("calm_jax.train", ("--config", "configs/finetune.py", "--workdir", file)),
                          ("calm_jax.evaluate", ("--workdir", tmp_path, "--task", "scoring", "--out", file)),
                          ("tools.prepare_data", ("--dataset", "folder", "--source", photos, "--data_dir", file))):
        refused(subprocess.run([sys.executable, "-m", module, *map(str, words)], cwd=miniature.ROOT,
                               capture_output=True, env=miniature.environment()), file)
    assert file.read_text() == "mine"


# ---- names ------------------------------------------------------------------------------------------------------


def test_names_survive_in_results_and_harm_no_terminal(photos, checkpoint, tmp_path):
    """Also where the second run reads what the first has written, and in a locale that can say little."""
    out = tmp_path / "scores.csv"
    for _ in range(2):
        done = calm("score", photos, "--checkpoint", checkpoint, "--format", "csv", "--out", out)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert b"3 of 3" in done.stderr
    with open(out, encoding="utf-8", errors="surrogateescape", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["path"] for row in rows} == {os.path.join(photos, name) for name in os.listdir(photos)}
    lines = out.with_name("scores.csv.journal").read_bytes().decode("utf-8").splitlines()  # JSON has to be UTF-8
    assert {json.loads(line)["path"] for line in lines[1:]} == {row["path"] for row in rows}
    done = calm("score", photos, "--checkpoint", checkpoint, env={"PYTHONIOENCODING": "cp1252:strict"})
    assert done.returncode == 0 and done.stdout.count(b"\n") == 4, done.stderr
    assert b"\x1b" not in done.stdout and b"\x07" not in done.stdout and b"a.png" in done.stdout


def test_what_a_terminal_shows_has_no_control_characters():
    assert terminal.shown("a\x1b[2J\nb\u202ec\x9b") == "a\\x1b[2J\\nb\\u202ec\\x9b"
    stream = io.StringIO()
    safe = terminal._Safe(stream)
    print("x\x1b[31my\r\n", file=safe)
    assert stream.getvalue() == "x\\x1b[31my\r\n\n" and not safe.isatty()


def test_no_log_brings_a_control_sequence_to_a_terminal():
    body = "(__import__('absl.logging').logging.warning('a\\x1b[2Jb'), __import__('logging').warning('c\\x9bd'), 0)[2]"
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(body)], cwd=miniature.ROOT, capture_output=True)
    assert done.stderr.count(b"\n") == 2 and not set("\x1b\x9b") & set(done.stderr.decode()), done.stderr


def test_a_list_may_come_in_many_forms(tmp_path):
    names = [b"a b.jpg", b"caf\xe9.jpg", b"c.jpg"]
    wanted = list(map(os.fsdecode, names))
    plain = names[0].decode(), names[2].decode()
    for data, expected in ((b"\n".join(names), wanted), (b"\r\n".join(names) + b"\r\n\r\n", wanted),
                           (b"\0".join(names) + b"\0", wanted), (b"\xef\xbb\xbf" + b"\n".join(names), wanted),
                           ("\r\n".join(plain).encode("utf-16"), list(plain))):
        assert gather(["-"], io.TextIOWrapper(io.BytesIO(data))) == expected
    for data in (b"", b"\n\n", b"\xff\xfe\x00"):
        with pytest.raises(ConfigError, match="standard input"):
            gather(["-"], io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("data", ["a.jpg\nb.jpg\n".encode("utf-16-le"), "a.jpg\nb.jpg\n".encode("utf-16-be"), None])
def test_a_list_that_is_none_is_refused(data):
    with pytest.raises(ConfigError, match="standard input"):
        gather(["-"], None if data is None else io.TextIOWrapper(io.BytesIO(data)))


def test_links_that_lead_back_cost_nothing(tmp_path):
    """Followed, two of them are 2 ** 40 folders."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b.jpg").mkdir()
    for name in ("a/one.jpg", "two.jpg", "a/.hidden.jpg"):
        (tmp_path / name).touch()
    for name in ("x", "y"):
        os.symlink(".", tmp_path / "a" / name)
    for pattern, names in (("**/*.jpg", {"one", "two"}), ("**", {"one", "two"}), ("**/a/**/o*", {"one"}),
                           ("*", {"two"})):
        found = gather([f"{tmp_path}/{pattern}"], io.StringIO())
        assert {pathlib.Path(path).stem for path in found} == names and len(found) == len(names)


@pytest.mark.parametrize("content", [b"a line of mine\nand another", b"one line of mine"])
def test_a_file_of_the_users_with_the_name_of_a_journal_is_left_alone(tmp_path, content):
    file = tmp_path / "scores.csv.journal"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=file.name):
        Journal(file, {"verb": "score"})
    assert file.read_bytes() == content


def test_a_full_disk_leaves_a_journal_to_go_on_with(tmp_path, monkeypatch):
    file = tmp_path / "scores.csv.journal"
    journal = Journal(file, {"verb": "score"})
    journal.add({"path": "a.jpg", "stamp": [0, 0], "score": 1.0})

    class Full:
        """Takes a few bytes more, and is full."""

        def __init__(self, stream):
            self._stream, self._room = stream, 10

        def write(self, data):
            if not self._room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count, self._room = self._stream.write(data[:self._room]), 0
            return count

        def __getattr__(self, name):
            return getattr(self._stream, name)

    before = file.read_bytes()
    monkeypatch.setattr(journal, "_file", Full(journal._file))
    with pytest.raises(OSError) as raised:
        journal.add({"path": "b.jpg", "stamp": [0, 0], "score": 2.0})
    assert raised.value.filename == str(file) and file.read_bytes() == before
    journal.close()
    assert set(Journal(file, {"verb": "score"}).rows) == {"a.jpg"}


def test_folders_that_contain_each_other_give_each_file_once(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "one.jpg")
    os.symlink("..", tmp_path / "a" / "up")
    os.symlink("one.jpg", tmp_path / "a" / "two.jpg")  # another name that somebody gave it
    found = gather([f"{tmp_path}/**/*.jpg", str(tmp_path), f"{tmp_path}/a/./one.jpg"], io.StringIO())
    assert sorted(pathlib.Path(path).name for path in found) == ["one.jpg", "two.jpg"]


# ---- the page ---------------------------------------------------------------------------------------------------


def test_a_page_of_attributes_is_made_by_many_threads(photos, checkpoint, tmp_path):
    for number in range(3):  # it failed in three of four runs
        out = tmp_path / f"{number}" / "sheet.html"
        done = calm("attributes", photos, "--checkpoint", checkpoint, "--format", "html", "--out", out, "--batch", "4")
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
        assert len(list(out.with_name("sheet-pictures").iterdir())) == 3
        if not miniature.THOROUGH:
            break


def test_a_result_is_computed_once_by_all_who_ask():
    asked, lock = [], threading.Lock()

    def slow(key):
        with lock:
            asked.append(key)
        time.sleep(0.02)
        if key == 3:
            raise ValueError("three")
        return key * 2

    ask, results = once(slow, 4), []

    def work(key):
        with contextlib.suppress(ValueError):
            results.append(ask(key))

    threads = [threading.Thread(target=work, args=(key,)) for key in (1, 1, 2, 2, 3, 3, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked) == [1, 2, 3] and sorted(results) == [2, 2, 2, 4, 4, 4]
    for key in range(10, 20):
        assert ask(key) == 2 * key
    assert ask(19) == 38 and asked.count(19) == 1  # among the latest
    assert ask(1) == 2 and asked.count(1) == 2  # forgotten meanwhile


def test_writers_at_the_same_time_leave_one_whole_file_and_nothing_else(tmp_path):
    texts = [str(number) * 20_000 for number in range(8)]
    threads = [threading.Thread(target=files.write, args=(tmp_path / "file", text)) for text in texts for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in texts and len(list(tmp_path.iterdir())) == 1
    os.symlink("file", tmp_path / "link")
    (tmp_path / "file").chmod(0o640)
    files.write(tmp_path / "link", texts[0])  # what a link leads to is written, and keeps its permissions
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link").unlink()
    for name in ("n" * 255, "\u5199" * 85):  # as long as a name can be
        files.write(tmp_path / name, "text")
        (tmp_path / name).unlink()
    with pytest.raises(OSError):
        files.write(tmp_path / "file" / "below", "text")
    assert (tmp_path / "file").read_text() in texts and len(list(tmp_path.iterdir())) == 1


# ---- while it is written ----------------------------------------------------------------------------------------


PROGRAM = "from calm_jax import guard; guard.run(lambda: {})"


@pytest.mark.parametrize(("body", "code", "named"), [
    ("print('x' * 99999999)", (141,), ""), ("open('/dev/full', 'w').write('x' * 99999)", (1,), "No space"),
    ("open('/etc/passwd/x')", (1,), "/etc/passwd/x"), ("open('/')", (1,), "/"),
    ("(_ for _ in ()).throw(KeyboardInterrupt)", (130,), "interrupted")])
def test_errors_of_the_system_are_a_sentence(body, code, named):
    """In every program, for they all begin like this; `head` reads the first line and goes."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(body)], cwd=miniature.ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.read(9)
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait(60) in code and "Traceback" not in said and "Exception ignored" not in said
    assert named in said and said.count("\n") == (1 if named else 0)


def test_standard_output_that_is_full_or_closed(photos, checkpoint):
    with open("/dev/full", "w") as full:
        done = calm("score", photos, "--checkpoint", checkpoint, capture_output=False, stdout=full,
                    stderr=subprocess.PIPE)
    assert done.returncode == 1 and b"Traceback" not in done.stderr and b"No space" in done.stderr
    assert guard.REMEDIES
