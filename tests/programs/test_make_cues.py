"""tools.make_cues against a real endpoint on loopback: what passes, what is refused, and nothing paid for twice."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time

import miniature
import openai_server
import pytest
from openai_server import Raw, Server, error

from calm_jax.commands import cues as make_cues
from calm_jax.data import cues
from calm_jax.data.cues import stored
from calm_jax.errors import ConfigError

MODEL = "gpt-3.5-turbo"
NOISE = 13  # requests about noise: ten places, three verifications


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def make(server: Server, out, **more):
    """Asks about noise only, five phrases a place, without waiting long between retries."""
    options = {"model": MODEL, "key": "secret", "base_url": server.url, "names": ("noise",), "per_place": 5,
               "say": lambda text: None, **more}
    return make_cues.make(str(out), **options)


def program(server: Server | None, out, *words: str, key: str = "secret", **options) -> subprocess.Popen:
    environment = {**os.environ, "OPENAI_API_KEY": key, "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(miniature.ROOT)}
    environment.pop("OPENAI_BASE_URL", None)
    if server is not None:
        environment["OPENAI_BASE_URL"] = server.url
    command = [sys.executable, "-m", "tools.make_cues", "--out", str(out), "--attributes=noise", "--per_place=5"]
    return subprocess.Popen([*command, *words], cwd=miniature.ROOT, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, **options)


def journal(out: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]


def result(out: pathlib.Path) -> dict:
    return json.loads((out / "cues.json").read_text())


def at(content: dict, kind: str, grade: int | None = None, what: str = "phrases") -> list[dict]:
    return [entry for entry in content[what] if (entry["kind"], entry["grade"]) == (kind, grade)]


def is_about(prompt: str, wanted: str) -> bool:
    """Whether a prompt asks for phrases of `answer`, grade 0 of noise and so on, named by a part of its text."""
    return "Write " in prompt and wanted in prompt


def test_a_whole_run(tmp_path):
    said, costs = [], []
    with Server() as server:
        path = make(server, tmp_path, names=("noise", "tilt"), say=said.append, prices=(0.5, 1.5),
                    confirm=lambda cost: costs.append(cost) or True)
        asked = sum(server.asked.values())
        again = make(server, tmp_path, names=("noise", "tilt"), say=said.append)
        assert sum(server.asked.values()) == asked and again == path
        assert server.keys == {"Bearer secret"} and set(server.answered.values()) == {1}
    assert len(costs) == 1 and f"about {asked} requests to {MODEL} at 127.0.0.1:" in costs[0] and "$0.0" in costs[0]
    assert asked == len(journal(tmp_path)) == 2 * NOISE
    content = result(tmp_path)
    places = {(entry["attribute"], entry["kind"], entry["grade"]) for entry in content["phrases"]}
    assert places == {place for place, _ in stored.places(cues.CUES) if place[0] in ("noise", "tilt")}
    for entry in content["phrases"]:
        assert openai_server.place(entry["text"]) == (entry["attribute"], entry["kind"], entry["grade"])
        source = content["requests"][entry["request"]]
        assert source["model"] == MODEL and source["served"] == f"{MODEL}-0125" and source["date"].startswith("20")
        assert source["endpoint"].startswith("127.0.0.1:") and len(source["prompt"]) == 16
        assert source["request_id"] == "req-1" and source["id"].startswith("chatcmpl-")
        assert (entry["verified"] == "") == (entry["kind"] == "question")
    bank = cues.bank(str(path))
    assert [len(texts) for texts in bank["noise"].answers] == [len(texts) + 5 for texts in cues.CUES["noise"].answers]
    assert bank["exposure"] == cues.CUES["exposure"]
    assert f"{2 * NOISE} replies, 0 of them malformed; {2600} tokens sent, {1300} received, $0.0032" in said[0]


def test_more_phrases_are_asked_later_and_only_those(tmp_path):
    with Server() as server:
        make(server, tmp_path, per_place=3)
        make(server, tmp_path, per_place=5)
        assert set(server.answered.values()) == {1} and len(journal(tmp_path)) == 2 * NOISE
        assert sum("Write 2 phrases" in prompt for prompt in server.asked) == 10
    assert all(count == 5 for count in collections.Counter(
        (entry["kind"], entry["grade"]) for entry in result(tmp_path)["phrases"]).values())


def test_rate_limits_and_failures_are_waited_for(tmp_path):
    moments = collections.defaultdict(list)

    def policy(prompt, before):
        moments[prompt].append(time.monotonic())
        if before == 0:
            return error(429, "rate_limit_exceeded", Retry_After="0.3")
        return error(500, Retry_After="0.05") if before == 1 and "Write" in prompt else None

    with Server(policy) as server:
        make(server, tmp_path, concurrency=16)
        assert set(server.answered.values()) == {1} and len(journal(tmp_path)) == NOISE
        assert all(server.asked[prompt] == (3 if "Write" in prompt else 2) for prompt in server.asked)
    assert all(second - first >= 0.29 for first, second, *_ in moments.values())


def test_rate_limits_without_end_stop_with_a_sentence(tmp_path):
    limit = error(429, "rate_limit_exceeded", Retry_After="0.01")
    with Server(lambda prompt, before: limit) as server, \
            pytest.raises(make_cues.Stopped, match=r"still limits the rate .* 0 replies are kept, and the same comm"):
        make(server, tmp_path, retries=2)
    assert set(server.asked.values()) == {3}


def test_malformed_wrong_and_repeated_replies(tmp_path):
    good = ["Overall, even areas look clean.", "Plainly, no noise is visible."]
    script = [
        "I am sorry, I cannot do that.",
        json.dumps({"phrases": [
            "The picture is very noisy.", "Overall, a little grain is visible.", "Overall, strong noise is visible.",
            "The picture is dark.", "No noise.\nNone.", "USER: no noise is visible.", "No noise", 7,
            "No blur or noise.", "No noise is visible.", good[0], good[0].upper().capitalize(), good[0]]}),
        "```json\n" + json.dumps({"phrases": good[1:]}) + "\n```",
        '{"phrases": ["Half of a reply',
        json.dumps({"phrases": ["Never asked for."]}),
    ]
    counted = []

    def policy(prompt, before):
        if is_about(prompt, "About grade 0 only") and "state of a picture" in prompt:
            counted.append(prompt)
            return script[len(counted) - 1]
        return None

    with Server(policy) as server:
        make(server, tmp_path, attempts=4)
        make(server, tmp_path, attempts=4)  # given up: not asked for again
    content = result(tmp_path)
    assert sorted(entry["text"] for entry in at(content, "answer", 0)) == sorted(good)
    # The answers are one phrase short after each reply; a prompt asks for the rest and names what was had.
    assert [int(prompt.split("Write ")[1].split()[0]) for prompt in counted] == [5, 5, 4, 3]
    assert good[0] not in counted[1] and f"- {good[0]}" in counted[2] and f"- {good[1]}" in counted[3]
    reasons = {entry["text"]: entry["reason"] for entry in at(content, "answer", 0, "rejected")}
    for text, reason in {
            "Overall, a little grain is visible.": "may mean grade 1, not clearly grade 0",
            "The picture is very noisy.": "may mean grade 2", "The picture is dark.": "is not about noise",
            "No noise.\nNone.": "line breaks", "USER: no noise is visible.": "marker", "No noise": "end",
            "7": "no text", "No blur or noise.": "speaks of sharpness", "No noise is visible.": "there already",
            good[0]: "there already"}.items():
        assert reason in reasons[text], text
    assert [entry["attempt"] for entry in journal(tmp_path) if entry["key"] == "noise/answer/0"] == [1, 2, 3, 4]
    entry = next(entry for entry in journal(tmp_path) if entry["key"] == "noise/answer/0")
    assert entry["text"] == script[0] and entry["sent"] == 100  # paid for, and kept as it came


def test_a_reply_that_is_no_completion_is_paid_for_and_asked_again(tmp_path):
    bodies = [Raw(200, "<html>busy</html>"), Raw(200, '{"choices": []}'), Raw(200, '{"choices": [{"message": null}]}')]
    with Server(lambda prompt, before: bodies[before] if "Write" in prompt and before < 3 else None) as server:
        make(server, tmp_path)
        assert len(journal(tmp_path)) == NOISE + 30
        assert all(server.asked[prompt] == 4 for prompt in server.asked if "Write" in prompt)
    assert len(result(tmp_path)["phrases"]) == 50


def test_a_phrase_that_the_judge_reads_otherwise_is_not_used(tmp_path):
    doubted = set()

    def policy(prompt, before):
        if "noise of photographs. Which of these does a phrase say" not in prompt:
            return None
        said = json.loads(openai_server.reply(prompt))
        if not doubted:
            numbers = list(said)
            doubted.update(line.split(". ", 1)[1] for line in prompt.splitlines()
                           if line.split(".")[0] in (numbers[0], numbers[1]))
            said[numbers[0]] = "N"
            said[numbers[1]] = "B" if said[numbers[1]] != "B" else "C"
            said[numbers[2]] = "nonsense"  # is asked again
        return json.dumps(said)

    with Server(policy) as server:
        make(server, tmp_path)
    content = result(tmp_path)
    assert {entry["text"] for entry in content["rejected"]} == doubted
    assert {entry["reason"].rstrip("012") for entry in content["rejected"]} == {
        "was classified as none of them", "was classified as grade "}
    assert len(content["phrases"]) == 50  # what was refused was asked for anew
    assert [entry["attempt"] for entry in journal(tmp_path) if entry["key"] == "verify/noise/answers"] == [1, 2]
    assert len(journal(tmp_path)) == NOISE + 2 + (len({entry["request"] for entry in content["rejected"]}) - 1)
    with Server() as server:
        make(server, tmp_path, verify=False)  # what was found wrong stays so
    assert result(tmp_path)["rejected"] == content["rejected"] and not server.asked


def test_a_judge_that_says_nothing_is_given_up(tmp_path):
    with Server(lambda prompt, before: None if "Write" in prompt else "No.") as server:
        make(server, tmp_path, attempts=2)
        make(server, tmp_path, attempts=2)
    assert len(journal(tmp_path)) == NOISE + 3
    assert {entry["kind"] for entry in result(tmp_path)["phrases"]} == {"question"}


def test_no_verification(tmp_path):
    with Server() as server:
        make(server, tmp_path, verify=False)
        assert len(journal(tmp_path)) == 10 and len(result(tmp_path)["phrases"]) == 50
        make(server, tmp_path)  # made up for later
        assert len(journal(tmp_path)) == NOISE and set(server.answered.values()) == {1}


def test_requests_are_really_under_way_at_the_same_time(tmp_path):
    together = threading.Barrier(4)

    def policy(prompt, before):
        if "Write" in prompt and sum(server.asked.values()) <= 4:
            together.wait(timeout=20)  # none of four is answered before all have come

    with Server(policy) as server:
        make(server, tmp_path, concurrency=4)
        assert server.most == 4
    with Server(delay=0.01) as server:
        make(server, tmp_path / "one", concurrency=1)
        assert server.most == 1


def test_a_kill_in_the_middle_costs_nothing_twice(tmp_path):
    with Server(delay=0.15) as server:
        first = program(server, tmp_path, "--yes", "--concurrency=3")
        while sum(server.answered.values()) < 6:
            time.sleep(0.01)
            assert first.poll() is None, first.communicate()
        first.send_signal(signal.SIGKILL)
        first.communicate()
        kept = journal(tmp_path)
        assert 3 <= len(kept) < NOISE and not (tmp_path / "cues.json").exists()
        with (tmp_path / "journal.jsonl").open("a") as file:
            file.write('{"key": "noise/answer/0", "att')  # as if killed while it wrote
        server.delay = 0.0
        second = program(server, tmp_path, "--yes", "--concurrency=3")
        out, err = second.communicate(timeout=60)
        assert second.returncode == 0, err
        assert f"{len(kept)} replies are in " in out and f"about {NOISE - len(kept)} requests" in out
        assert journal(tmp_path)[:len(kept)] == kept
        names = [(entry["key"], entry["attempt"]) for entry in journal(tmp_path)]
        assert len(set(names)) == len(names) == NOISE
        # What was under way when it was killed, at most three, never reached it; nothing else came twice.
        assert sum(count - 1 for count in server.asked.values()) <= 3
        assert "tokens sent" in out and "train with --config.processes.NAME.cues=" in out
        before = dict(server.asked)
        make(server, tmp_path)
        assert dict(server.asked) == before
    hashes = {entry["prompt"] for entry in kept}
    assert len(hashes) == len(kept)


def test_an_interrupt_waits_for_what_is_under_way(tmp_path):
    with Server(delay=0.3) as server:
        process = program(server, tmp_path, "--yes", "--concurrency=4")
        while sum(server.asked.values()) < 4:
            time.sleep(0.01)
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and err.splitlines()[-1].startswith("error: interrupted; every reply is kept")
        assert len(journal(tmp_path)) == sum(server.answered.values()) == 4
    assert len(result(tmp_path)["phrases"]) <= 20  # what needs no judge


def test_an_exhausted_quota_stops_and_continues_another_day(tmp_path):
    empty = threading.Event()

    def policy(prompt, before):
        if sum(server.answered.values()) >= 5:
            empty.set()
        return error(429, "insufficient_quota", Retry_After="0.01") if empty.is_set() and not paid else None

    paid = False
    with Server(policy) as server:
        process = program(server, tmp_path, "--yes", "--concurrency=2", "--retries=1")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        kept = len(journal(tmp_path))
        assert err.splitlines()[-1] == (
            f"error: the quota of the key is exhausted; {kept} replies are kept, and the same command again goes on "
            "from there once there is money on the account")
        assert kept == sum(server.answered.values()) and "Traceback" not in err
        paid = True
        make(server, tmp_path)
        assert set(server.answered.values()) == {1} and len(journal(tmp_path)) == NOISE


@pytest.mark.parametrize(("answer", "sentence"), [
    (error(401, "invalid_api_key"), r"127.0.0.1:\d+ refuses the key in OPENAI_API_KEY \(401\)"),
    (error(404, "model_not_found"), "or no model 'gpt-3.5-turbo'"),
    (error(400), "refuses a request: .*it went wrong with 400.* 0 replies are kept"),
    (error(503, Retry_After="0.01"), "fails with 503 after every retry"),
    (error(402), "quota of the key is exhausted"),
])
def test_what_the_endpoint_refuses_is_one_sentence(tmp_path, answer, sentence):
    with Server(lambda prompt, before: answer) as server, pytest.raises(make_cues.Stopped, match=sentence) as raised:
        make(server, tmp_path, retries=1)
    assert "\n" not in str(raised.value) and not (tmp_path / "cues.json").exists()


def test_an_endpoint_that_is_not_there(tmp_path):
    with Server() as server:
        pass
    with pytest.raises(make_cues.Stopped, match=r"127.0.0.1:\d+ cannot be reached: .*the same command again"):
        make(server, tmp_path, retries=0)


@pytest.mark.parametrize("url", ["localhost:1234/v1", "ftp://host/v1", "http://", "http://[::1/v1"])
def test_addresses_that_are_none(tmp_path, url):
    with pytest.raises(ConfigError, match="--base_url="):
        make_cues.make(str(tmp_path), model=MODEL, key="secret", base_url=url)


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with Server() as server:
        with pytest.raises(ConfigError, match=r"cannot be written: .*choose another --out"):
            make(server, tmp_path / "file" / "below")
        make(server, tmp_path / "one", per_place=1)
        with pytest.raises(ConfigError, match=r"holds replies of 'gpt-3.5-turbo'; choose another --out"):
            make(server, tmp_path / "one", model="other")
        used = make_cues.Journal(tmp_path / "one" / "journal.jsonl")
        with pytest.raises(ConfigError, match="another run is writing"):
            make(server, tmp_path / "one")
        used.close()
        lines = (tmp_path / "one" / "journal.jsonl").read_text().splitlines()
        (tmp_path / "one" / "journal.jsonl").write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]) + "\n")
        with pytest.raises(ConfigError, match=r"line 2 of .* is damaged"):
            make(server, tmp_path / "one")
        with pytest.raises(ConfigError, match="nearest is 'noise'"):
            make(server, tmp_path / "two", names=("noize",))


def test_a_full_disk_keeps_what_it_has(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    with Server() as server:
        process = program(server, tmp_path, "--yes", "--concurrency=1", preexec_fn=limit)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        kept = journal(tmp_path)  # whole lines only
        assert 1 <= len(kept) < NOISE
        assert f"cannot be written: [Errno 27] File too large; the last replies are lost, {len(kept)} are kept; free " \
               "some space, and the same command" in err.splitlines()[-1]
        make(server, tmp_path)
        assert len(journal(tmp_path)) == NOISE and sum(server.answered.values()) == NOISE + 1


def test_the_command_line(tmp_path):
    with Server() as server:
        runs = [(program(server, tmp_path / "a", "--yes", key=""), 2, "error: OPENAI_API_KEY is not set"),
                (program(server, tmp_path / "b"), 2, "error: nobody is there to confirm the cost; add --yes"),
                (program(server, tmp_path / "c", "--yes", "--concurrency=0"), 2, "'--concurrency'"),
                (program(server, tmp_path / "f", "--yes", "--model=llama-3", "--no-verify"), 0, "")]
        for process, code, sentence in runs:
            out, err = process.communicate(timeout=60)
            assert process.returncode == code and sentence in err and "Traceback" not in err, err
        assert sum(server.asked.values()) == 10  # the last one's
    assert "an unknown price (--price_per_million IN,OUT would tell)" in out
    assert not (tmp_path / "a").exists() and len(journal(tmp_path / "f")) == 10


def test_prices():
    assert make_cues.price("gpt-4o-mini-2024-07-18", None) == (0.15, 0.6) == make_cues.price("x", "0.15,0.6")
    assert make_cues.price("gpt-4o", None) == (2.5, 10.0) and make_cues.price("gpt-4omni", None) is None
    with pytest.raises(ConfigError, match="is not IN,OUT"):
        make_cues.price("x", "cheap")
    assert make_cues.money((0.5, 1.5), 1_000_000, 2_000_000) == "$3.5000"
