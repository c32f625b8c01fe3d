"""An endpoint that speaks OpenAI's protocol in; a file of further phrases about every attribute, with provenance, out.

    OPENAI_API_KEY=... python -m calm cues --out runs/cues
    python -m calm cues --out DIR [--model NAME] [--base_url URL] [--per_place 12] [--no-verify] [--yes]

The paper has GPT-3.5 write the textual cues; this asks it, or any other model, and uses what passes. Every reply is
appended to DIR/journal.jsonl and synced before anything else happens, so that whatever ends the program, the same
command again goes on and asks nothing twice that was answered. DIR/cues.json is what `config.processes.NAME.cues`
takes. Prices are list prices of a certain date; your bill is what counts.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import signal
import sys
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

import openai
import tqdm

from calm_jax import files
from calm_jax.commands.cue_requests import Harvest, Request
from calm_jax.data import attributes
from calm_jax.data.cues import stored
from calm_jax.errors import ConfigError

PRICES_OF = "2026-03"
PRICES = {  # model -> dollars for a million tokens sent, and received
    "gpt-3.5-turbo": (0.50, 1.50), "gpt-4o-mini": (0.15, 0.60), "gpt-4o": (2.50, 10.00),
    "gpt-4.1-nano": (0.10, 0.40), "gpt-4.1-mini": (0.40, 1.60), "gpt-4.1": (2.00, 8.00),
}
TIMEOUT = 120.0  # seconds: a request that is given up may be paid for all the same
AGAIN = "the same command again goes on from there"


class Stopped(RuntimeError):
    """The run cannot go on now; what was paid for is kept."""


class Journal:
    """The replies that were paid for, one JSON object a line, appended and synced one by one.

    Raises:
      ConfigError: the file cannot be read or written, is damaged, or another run is using it.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+", buffering=0)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}; choose another --out") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another run is writing {path}; wait for it or stop it") from None
        self.entries = self._read()

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # killed while it wrote
            self._file.truncate(whole)
        entries = []
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                entries.append({**entry, "key": str(entry["key"]), "attempt": int(entry["attempt"]),
                                "text": str(entry["text"])})
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"line {number} of {self.path} is damaged; remove that line, and its "
                                  "reply is asked for again") from None
        return entries

    def append(self, entry: dict[str, Any]) -> None:
        """Raises Stopped when the disk does not take it; the journal is then as it was."""
        end = self._file.seek(0, os.SEEK_END)
        line = json.dumps(entry).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise Stopped(f"{self.path} cannot be written: {error}; the last replies are lost, {len(self.entries)} "
                          f"are kept; free some space, and {AGAIN}") from None
        self.entries.append(entry)

    def close(self) -> None:
        self._file.close()


def price(model: str, given: str | None) -> tuple[float, float] | None:
    """Dollars for a million tokens sent and received; None where nobody said.

    Raises:
      ConfigError: `given` is not IN,OUT.
    """
    if given:
        try:
            sent, received = map(float, given.split(","))
        except ValueError:
            raise ConfigError(f"--price_per_million={given!r} is not IN,OUT, such as 0.5,1.5") from None
        return sent, received
    fitting = [name for name in PRICES if model == name or model.startswith(f"{name}-")]
    return PRICES[max(fitting, key=len)] if fitting else None


def money(prices: tuple[float, float] | None, sent: int, received: int) -> str:
    """What tokens cost, in words."""
    return "an unknown price" if prices is None else f"${(sent * prices[0] + received * prices[1]) / 1e6:.4f}"


class Run:
    """Asks what is open, so many requests at the same time, until nothing is or something forbids to go on."""

    def __init__(self, client: openai.AsyncOpenAI, model: str, host: str, harvest: Harvest, journal: Journal,
                 prices: tuple[float, float] | None, concurrency: int, temperature: float | None):
        self.client, self.model, self.host, self.harvest, self.journal = client, model, host, harvest, journal
        self.prices, self.concurrency = prices, concurrency
        self.options = {} if temperature is None else {"temperature": temperature}
        self.why = ""  # it cannot go on

    async def __call__(self) -> None:
        """Raises Stopped; what was under way is waited for and kept first."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupted)
        async with self.client:
            with tqdm.tqdm(total=self.harvest.remaining(), unit="request", mininterval=0.2) as bar:
                await self._ask_all(bar)
        if self.why:
            raise Stopped(self.why)

    async def _ask_all(self, bar: tqdm.tqdm) -> None:
        running: dict[asyncio.Task, Request] = {}
        while True:
            for request in self.harvest.open([request.key for request in running.values()]):
                if self.why or len(running) >= self.concurrency:
                    break
                running[asyncio.create_task(self._reply(request))] = request
            if not running:
                return
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                running.pop(task)
                self._keep(task, bar)

    def _interrupted(self) -> None:
        if self.why:  # twice is meant
            raise KeyboardInterrupt
        self.why = f"interrupted; every reply is kept, and {AGAIN}"

    def _keep(self, task: asyncio.Task, bar: tqdm.tqdm) -> None:
        try:
            entry = task.result()
            self.journal.append(entry)
        except Stopped as error:
            self.why = self.why or str(error)
            return
        self.harvest.take(entry)
        sent, received = spent(self.journal)
        bar.total = bar.n + 1 + self.harvest.remaining()  # what is under way is among what remains
        bar.set_postfix_str(f"{sent + received} tokens, {money(self.prices, sent, received)}", refresh=False)
        bar.update()

    async def _reply(self, request: Request) -> dict[str, Any]:
        """The reply as a journal entry. Raises Stopped when there is none to be had."""
        try:
            raw = await self.client.chat.completions.with_raw_response.create(
                model=self.model, messages=request.messages, **self.options)
        except openai.OpenAIError as error:
            raise Stopped(self._sentence(error)) from None
        return {"key": request.key, "attempt": request.attempt, "model": self.model, "endpoint": self.host,
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "prompt": request.hash,
                "request_id": raw.headers.get("x-request-id", ""), **_content(raw.http_response.content),
                "shown": list(request.shown)}

    def _sentence(self, error: openai.OpenAIError) -> str:
        kept = f"{len(self.journal.entries)} replies are kept, and {AGAIN}"
        code = getattr(error, "code", None)
        said = " ".join(str(getattr(error, "message", error)).split())[:200]
        if code == "insufficient_quota" or getattr(error, "status_code", 0) == 402:
            return f"the quota of the key is exhausted; {kept} once there is money on the account"
        if isinstance(error, openai.RateLimitError):
            return f"{self.host} still limits the rate after every retry: {said}; {kept}, best with less --concurrency"
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            return f"{self.host} refuses the key in OPENAI_API_KEY ({error.status_code}): {said}"
        if isinstance(error, openai.NotFoundError):
            return (f"{self.host} knows no {self.client.base_url.path}chat/completions or no model {self.model!r}: "
                    f"{said}; correct --base_url, which usually ends in /v1, or --model")
        if isinstance(error, openai.APIConnectionError):
            return f"{self.host} cannot be reached: {error.__cause__ or said}; {kept}"
        if isinstance(error, openai.APIStatusError) and error.status_code >= 500:
            return f"{self.host} fails with {error.status_code} after every retry; {kept}"
        return f"{self.host} refuses a request: {said}; {kept}"


def _content(body: bytes) -> dict[str, Any]:
    """What counts of a completion, read by hand: a reply without the fields of the protocol was paid for all the
    same, and is kept as it came."""
    try:
        value = json.loads(body)
        message = value["choices"][0]
        usage = value.get("usage") or {}
        return {"id": str(value.get("id", "")), "served": str(value.get("model", "")),
                "finish": str(message.get("finish_reason", "")), "text": str(message["message"]["content"] or ""),
                "sent": int(usage.get("prompt_tokens") or 0), "received": int(usage.get("completion_tokens") or 0)}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {"id": "", "served": "", "finish": "malformed", "text": body.decode(errors="replace")[:20_000],
                "sent": 0, "received": 0}


def spent(journal: Journal) -> tuple[int, int]:
    """Tokens sent and received, all runs together."""
    return tuple(sum(int(entry.get(name) or 0) for entry in journal.entries) for name in ("sent", "received"))


def write(path: pathlib.Path, harvest: Harvest, journal: Journal) -> None:
    """The phrases that can be used, those that cannot with the reason, and where each comes from.

    Raises:
      Stopped: the disk does not take it.
    """
    usable = harvest.usable()
    rejected = [phrase for phrase in harvest.phrases if phrase.reason]
    named = {name for phrase in (*usable, *rejected) for name in (phrase.request, phrase.verified) if name}
    content = {
        "format": stored.FORMAT,
        "phrases": [{**_place(phrase), "text": phrase.text, "request": phrase.request, "verified": phrase.verified}
                    for phrase in usable],
        "rejected": [{**_place(phrase), "text": phrase.text, "request": phrase.request, "reason": phrase.reason}
                     for phrase in rejected],
        "requests": {
            f"{entry['key']}#{entry['attempt']}": {name: entry.get(name) for name in (
                "model", "served", "endpoint", "date", "prompt", "id", "request_id", "sent", "received")}
            for entry in journal.entries if f"{entry['key']}#{entry['attempt']}" in named}}
    try:
        files.write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise Stopped(f"{path} cannot be written: {error}; the replies are kept in {journal.path}, and the same "
                      "command again writes it without asking") from None


def _place(phrase) -> dict[str, Any]:
    return dict(zip(("attribute", "kind", "grade"), phrase.place, strict=True))


def summary(harvest: Harvest, journal: Journal, prices: tuple[float, float] | None) -> str:
    """What came of it, in a few lines."""
    sent, received = spent(journal)
    reasons = collections.Counter(phrase.reason.split(",")[0] for phrase in harvest.phrases if phrase.reason)
    lines = [f"{len(harvest.usable())} phrases from {len(journal.entries)} replies, {harvest.malformed} of them "
             f"malformed; {sent} tokens sent, {received} received, {money(prices, sent, received)}"]
    lines += [f"  {count:5} rejected: {reason}" for reason, count in reasons.most_common(8)]
    short = harvest.short()
    if short:
        first = ", ".join(f"{key} ({count})" for key, count in list(short.items())[:6])
        lines.append(f"  fewer than {harvest.wanted}: {first}{', ...' if len(short) > 6 else ''}; --attempts asks more")
    return "\n".join(lines)


def make(out: str, *, model: str, key: str, base_url: str | None = None, per_place: int = 12, concurrency: int = 8,
         attempts: int = 4, retries: int = 5, temperature: float | None = None, verify: bool = True,
         names: Sequence[str] = (), prices: tuple[float, float] | None = None,
         confirm: Callable[[str], bool] = lambda cost: True, say: Callable[[str], None] = print) -> pathlib.Path | None:
    """Asks for what is missing in the folder `out`, writes its cues.json and returns the path.

    Args:
      model: its name at the endpoint.
      key: of the endpoint.
      base_url: None is OPENAI_BASE_URL, or OpenAI.
      per_place: phrases wanted for each grade, question, comparison and advice.
      attempts: requests for one place until it is given up.
      retries: of one request, after rate limits, failures and lost connections.
      names: attributes; none are all.
      prices: dollars for a million tokens sent and received, None = unknown.
      confirm: is told what it will cost and decides whether to start; None is returned where it does not.
    Raises:
      ConfigError: something given cannot be used.
      Stopped: it cannot go on now; cues.json holds what there is.
    """
    client, host = _client(key, base_url, retries)
    for name in names:
        attributes.get(name)
    journal = Journal(pathlib.Path(out) / "journal.jsonl")
    try:
        harvest = Harvest(wanted=per_place, attempts=attempts, verify=verify,
                          names=names or list(attributes.ATTRIBUTES))
        for entry in journal.entries:
            if entry.get("model") != model:
                raise ConfigError(f"{out} holds replies of {entry.get('model')!r}; choose another --out for "
                                  f"{model!r}")
            harvest.take(entry)
        if journal.entries:
            say(f"{len(journal.entries)} replies are in {journal.path} and are not asked for again")
        if harvest.remaining() and not confirm(_estimate(harvest, model, host, prices)):
            return None
        path = pathlib.Path(out) / "cues.json"
        stopped = None
        try:
            if harvest.remaining():
                asyncio.run(Run(client, model, host, harvest, journal, prices, concurrency, temperature)())
        except Stopped as error:
            stopped = error
        except KeyboardInterrupt:
            stopped = Stopped(f"interrupted twice; what was under way is lost, and {AGAIN}")
        if journal.entries:
            try:
                write(path, harvest, journal)
            except Stopped as error:
                stopped = stopped or error
            say(summary(harvest, journal, prices))
        if stopped:
            raise stopped
    finally:
        journal.close()
    return path


def _client(key: str, base_url: str | None, retries: int) -> tuple[openai.AsyncOpenAI, str]:
    """The client, and host and port that it speaks to."""
    try:
        client = openai.AsyncOpenAI(api_key=key, base_url=base_url or None, max_retries=retries, timeout=TIMEOUT)
        url = urllib.parse.urlsplit(str(client.base_url))
        host = (url.hostname or "") + (f":{url.port}" if url.port else "")
    except Exception as error:  # the client's URL parser has errors of its own
        given = base_url or os.environ.get("OPENAI_BASE_URL")
        raise ConfigError(f"--base_url={given!r} cannot be used: {error}") from None
    if url.scheme not in ("http", "https") or not host:
        raise ConfigError(f"--base_url={str(client.base_url)!r} is no address such as https://host/v1")
    return client, host


def _estimate(harvest: Harvest, model: str, host: str, prices: tuple[float, float] | None) -> str:
    requests, sent, received = harvest.expected()
    return (f"about {requests} requests to {model} at {host}: some {sent} tokens sent and {received} received, "
            f"{money(prices, sent, received)}"
            + (f" (list prices of {PRICES_OF})" if prices and prices in PRICES.values() else "")
            + (" (--price_per_million IN,OUT would tell)" if prices is None else "")
            + "; more where replies cannot be used")


def _ask_person(cost: str, yes: bool) -> bool:
    print(cost)
    if yes:
        return True
    try:
        return input("start? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        raise ConfigError("nobody is there to confirm the cost; add --yes") from None


def run(out: str, *, price_per_million: str | None, model: str, yes: bool, **options: Any) -> int:
    """Asks for phrases, after the cost was confirmed; 1 where the endpoint made it stop.

    Args:
      options: as `make` takes them.

    Raises:
      ConfigError: see `make`; or there is no key.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise ConfigError("OPENAI_API_KEY is not set; export the key of the endpoint, or any word for one that needs "
                          "none")
    try:
        path = make(out, model=model, key=key, prices=price(model, price_per_million),
                    confirm=lambda cost: _ask_person(cost, yes), **options)
    except Stopped as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("nothing was asked" if path is None else
          f"written to {path}; train with --config.processes.NAME.cues={path}")
    return 0
