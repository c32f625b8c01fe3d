"""A policy in, a real HTTP server on loopback that speaks OpenAI's chat completions out; it counts what it is asked.

Its model is a stand-in that obeys the prompts of `tools.make_cues`: it varies the phrases that a prompt shows, and
classifies phrases by looking them up. A policy makes it misbehave.
"""

from __future__ import annotations

import collections
import dataclasses
import http.server
import json
import re
import threading
import time
from collections.abc import Callable

from calm_jax.data import cues
from calm_jax.data.cues import stored

OPENERS = ("In short", "Plainly", "To my eye", "Overall", "Undoubtedly", "As it happens", "Frankly", "All in all",
           "Clearly put", "To sum up", "Honestly", "Once again")
PLACES = {cues.normal(text): place for place, texts in stored.places(cues.CUES) for text in texts}


@dataclasses.dataclass(frozen=True)
class Raw:
    """What to send instead of a completion."""

    status: int
    body: str = ""
    headers: tuple[tuple[str, str], ...] = ()


def error(status: int, code: str = "", **headers: str) -> Raw:
    """An error as OpenAI words it."""
    body = json.dumps({"error": {"message": f"it went wrong with {status}", "type": "test", "code": code or None}})
    return Raw(status, body, tuple((name.replace("_", "-"), value) for name, value in headers.items()))


# (prompt, how often it was asked before) -> what to do instead: None = answer well, text = the content of the reply
Policy = Callable[[str, int], "str | Raw | None"]


class Server:
    """A context manager; `url` is the base URL.

    Attributes:
      asked: prompt -> how often it came; answered: prompt -> how often it got a completion, which one would pay for.
      most: requests that were under way at the same time, at most.
    """

    def __init__(self, policy: Policy = lambda prompt, before: None, delay: float = 0.0):
        self.policy, self.delay = policy, delay
        self.asked: collections.Counter[str] = collections.Counter()
        self.answered: collections.Counter[str] = collections.Counter()
        self.keys: set[str] = set()
        self.most = self._now = 0
        self._lock = threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                server.handle(self)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        prompt = "\n".join(message["content"] for message in body["messages"])
        with self._lock:
            self.keys.add(handler.headers["Authorization"])
            before = self.asked[prompt]
            self.asked[prompt] += 1
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            done = self.policy(prompt, before)
            time.sleep(self.delay)
            if handler.path != "/v1/chat/completions":
                done = error(404)
            if not isinstance(done, Raw):
                done = completion(body["model"], reply(prompt) if done is None else done)
        finally:
            with self._lock:
                self._now -= 1
        try:
            handler.send_response(done.status)
            for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(done.body.encode()))),
                                *done.headers):
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(done.body.encode())
            handler.wfile.flush()
        except OSError:
            return  # the client was killed
        if done.status == 200:
            with self._lock:
                self.answered[prompt] += 1


def completion(model: str, text: str) -> Raw:
    return Raw(200, json.dumps({
        "id": f"chatcmpl-{len(text)}", "object": "chat.completion", "created": 1, "model": f"{model}-0125",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}}), (("x-request-id", "req-1"),))


def reply(prompt: str) -> str:
    """What a good model says."""
    if "The phrases:" in prompt:
        numbered = re.findall(r"^(\d+)\. (.*)$", prompt.split("The phrases:")[1], re.MULTILINE)
        return json.dumps({number: letter(text) for number, text in numbered})
    return json.dumps({"phrases": phrases(prompt, int(re.search(r"Write (\d+) phrases", prompt)[1]))})


def phrases(prompt: str, count: int) -> list[str]:
    """New phrases made of those that the prompt shows."""
    shown = re.findall(r"^- (.*)$", prompt, re.MULTILINE)
    known = {cues.normal(text) for text in shown}
    written = [text for text in shown if cues.normal(text) in PLACES]
    made = (f"{opener}, {text[0].lower()}{text[1:]}" for opener in OPENERS for text in written)
    return [text for text in made if cues.normal(text) not in known][:count]


def place(text: str) -> stored.Place:
    """Where a phrase that `phrases` made belongs."""
    return PLACES[cues.normal(text.partition(", ")[2])]


def letter(text: str) -> str:
    """The class of a phrase in a verification."""
    if cues.normal(text.partition(", ")[2]) not in PLACES:
        return "N"
    name, kind, grade = place(text)
    if kind == "advice":
        return "ABC"[list(cues.CUES[name].advice).index(grade)]
    return "ABC"[grade] if kind == "answer" else "AB"[kind.startswith("less")]
