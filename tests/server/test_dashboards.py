"""The dashboard's questions, asked of a real Prometheus that watched a real run: the answers are the ledger's.

The run is short, and nothing is left to extrapolation. Counters are recorded from zero and are read at the time of a sample: then
`increase` is the sum itself. Histograms are read between two scrapes around the part of the run that is compared: then a quantile
lies in the bucket in which the ledger's own value lies. Gauges are read while streams hang on purpose.

Only the pace is the tests' own: a scrape each second instead of each 15, and the rules' 30 s are 5.
"""

from __future__ import annotations

import json
import math
import random
import re
import string
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from statistics import mean
from typing import Any, Final, NamedTuple

import pytest
import yaml

from collectors.records.metrics import HISTOGRAMS, NANO
from proxy import __version__
from proxy.journal import BackendBeat, Heartbeat, read_heartbeats
from proxy.last_reload import LastReload
from proxy.store import hash_key
from tests.conftest import Start
from tests.server.test_keys import command, until
from tests.support.glasshouse import Glasshouse
from tests.support.prometheus import Prometheus, tool
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import Reply, WireClient, ask, request

DASHBOARDS: Final = Path(__file__).parents[2] / "dashboards"
BOARD: Final[dict[str, Any]] = json.loads((DASHBOARDS / "grafana" / "overview.json").read_text())
PANELS: Final[dict[str, Any]] = {panel["title"]: panel for panel in BOARD["panels"] if panel["type"] != "row"}
COUNTED: Final = sorted(set(re.findall(r"series:(\w+):from_zero", json.dumps(BOARD))))
EDGES: Final = {row.name: [0, *row.bounds, math.inf] for row in HISTOGRAMS}

pytestmark = pytest.mark.timeout(300)  # the first test waits for the run

CHAT: Final = "/v1/chat/completions"
MODELS: Final = ("smollm2", "qwen3-8b")
BACKENDS: Final = ("gpu-0", "gpu-1")
KEYS: Final = ("default", "alice", "bob")
PROBES: Final = "system"
"""The key to which is booked what backends were asked that had hung."""
TEAM: Final = "research"
MEMBERS: Final = ("alice", "bob")
LIMITS: Final[dict[str, Any]] = {
    "teams": {TEAM: {"budgets": [{"tokens": 100_000, "per": "total"}, {"tokens": 1000, "per": "total", "soft": True}]}},
    "keys": {"alice": {"team": TEAM}, "bob": {"team": TEAM, "max_input_tokens": 1000}},
}
"""The soft budget is soon used up, the other one is less than what 128 answers may take; neither is ever refused else."""
PRICE: Final = {"price": {"input": "0.1", "cached_input": "0.02", "output": "0.4"}}
FAILED: Final = {"rejected", "upstream_error", "timeout", "internal_error", "crashed"}

CHOICES: Final = (
    {"model": ".*", "backend": ".*", "key": ".*"},
    {"model": "qwen3-8b", "backend": "gpu-1", "key": "alice"},
    {"model": "(smollm2|other)", "backend": "(gpu-0|none)", "key": "(alice|bob)"},
)
"""What the variables hold, as Grafana writes All, one value, several values."""

Row = dict[str, Any]


# -- the run --


class Callers:
    """`turned_away`: the error codes that were answered to requests without a valid key or path."""

    def __init__(self, proxy: Glasshouse) -> None:
        self._proxy = proxy
        self._secrets = {
            "default": proxy.key,
            **{name: command(proxy, "keys", "create", name).stdout.strip() for name in KEYS[1:]},
        }
        until(self._known, "the keys to be known")
        self.turned_away: Counter[str] = Counter()

    def _known(self) -> bool:
        snapshot, beats = self._proxy.snapshot(), read_heartbeats(self._proxy.settings.journal_path)
        there = all(hash_key(secret) in snapshot.keys for secret in self._secrets.values())
        return there and all(beat.snapshot_unix_ns >= snapshot.published_unix_ns for beat in beats)

    def worker(self) -> Heartbeat:
        """What the only one says."""
        [beat] = [beat for beat in read_heartbeats(self._proxy.settings.journal_path) if beat.alive]
        return beat

    def _all_back(self) -> bool:
        backends = self.worker().backends
        return bool(backends) and all(beat.state == "up" for beat in backends.values())

    def ask(self, key: str, body: dict[str, Any], path: str = CHAT) -> Reply:
        return ask(self._proxy.url, path, body, key=self._secrets[key])

    def do_well(self) -> None:
        """Ordinary traffic: each model, by each key, on each backend (they take turns), in several manners."""
        for model, key, _ in product(MODELS, KEYS, BACKENDS):
            slow = {"first": 0.06, "interval": 0.012, "tokens": 6, "prompt_tokens": 40, "cached_tokens": 16, "metrics": True}
            assert self.ask(key, chat(model, slow)).status == 200
        others: tuple[tuple[dict[str, Any], str], ...] = (
            (chat("qwen3-8b", {"first": 0.004, "interval": 0.003, "metrics": True}), CHAT),
            (chat("smollm2", {"tokens": 30, "metrics": True}, stream=False), CHAT),
            ({"model": "smollm2", "prompt": "Once"}, "/v1/completions"),
            ({"model": "qwen3-8b", "input": "text"}, "/v1/embeddings"),
        )
        for key, (body, path), _ in product(KEYS, others, BACKENDS):
            assert self.ask(key, body, path).status == 200
        for key, _ in product(KEYS, range(2)):  # what one of the team was answered the other one is too
            assert self.ask(key, chat("smollm2", {"tokens": 5}, temperature=0)).status == 200
            assert self.ask(key, chat("qwen3-8b", stream=False, seed=7)).status == 200
        assert ask(self._proxy.url, "/v1/models", key=self._secrets["bob"]).status == 200

    def do_badly(self) -> None:
        """What goes wrong on a bad day."""
        with ExitStack() as stack:
            hanging = [stack.enter_context(self.begin("alice", chat("qwen3-8b", {"hang": True}))) for _ in BACKENDS]
            for _ in BACKENDS:
                assert self.ask("alice", chat("qwen3-8b", {"status": 500})).status == 500
                assert self.ask("bob", chat("smollm2", {"status": 429})).status == 429
                assert self.ask("bob", chat("smollm2", max_tokens=-1)).status == 400
                assert self.ask("alice", chat("smollm2", {"cut_after_events": 3})).ending == "closed"
                with self.hold("bob") as leaving:
                    leaving.read(events=2)
            assert [waiting.read().status for waiting in hanging] == [504, 504]
        until(self._all_back, "the backends that hung to be in service again")
        assert self.ask("bob", chat("no-such-model")).status == 404
        assert self.ask("alice", chat("smollm2", n=128)).status == 429
        assert self.ask("bob", chat("qwen3-8b", user="word " * 2000)).status == 400
        assert self.ask("bob", chat("qwen3-8b", n=128)).status == 429
        for path, key in ((CHAT, "gh-nobody"), (CHAT, None), ("/metrics", self._secrets["bob"]), (CHAT, "gh-nobody")):
            reply = ask(self._proxy.url, path, chat("smollm2"), key=key)
            assert 400 <= reply.status < 500
            error = reply.json()["error"]
            self.turned_away[error["code"] or error["type"]] += 1

    def hold(self, key: str) -> WireClient:
        """A stream that hangs after two tokens."""
        return self.begin(key, chat("smollm2", {"hang_after_events": 3}))

    def begin(self, key: str, body: dict[str, Any]) -> WireClient:
        client = WireClient(self._proxy.url)
        client.send(request(CHAT, body, key=self._secrets[key]))
        return client


def chat(model: str, script: dict[str, Any] | None = None, stream: bool = True, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Say something."}]
    return {"model": model, "messages": messages, "stream": stream, **more, **({"script": script} if script else {})}


class Moment(NamedTuple):
    """A time (unix seconds) of which Prometheus knows all that the ledger knew: its rows."""

    at: float
    rows: list[Row]


class Watcher:
    """Prometheus at a Glasshouse: finds the times at which all is quiet, but for streams that are held."""

    def __init__(self, prometheus: Prometheus, proxy: Glasshouse, engines: Mapping[str, ScriptedVLLM]) -> None:
        self._prometheus = prometheus
        self._proxy = proxy
        self._engines = engines

    def scraped(self, held: int = 0, turned_away: int = 0) -> Moment:
        """The time of a scrape."""
        expected = {
            "sum(glasshouse_unaccepted_requests_total) or vector(0)": turned_away,
            "sum(glasshouse_requests_in_flight)": held,
            "sum(glasshouse_backend_requests_in_flight)": held,
            "sum(glasshouse_connections)": held,
            "sum(glasshouse_journal_lag_bytes)": 0,
            "sum(glasshouse_workers)": 1,
            "sum(glasshouse_sink_up)": 2,
            "sum(glasshouse_ledger_set_aside_records)": len(list(self._proxy.settings.state_path.glob("unstored/*.record"))),
            "sum(glasshouse_journal_damaged_segments)": len(list(self._proxy.settings.journal_path.glob("*.damaged"))),
        }

        def look() -> Moment | None:
            at = self._prometheus.number("timestamp(glasshouse_build_info)")
            rows = [labelled(row) for row in self._proxy.rows()]
            values = {"sum(glasshouse_requests_total) or vector(0)": len(rows), **expected, **self._said_by_engines()}
            quiet = not math.isnan(at) and all(self._prometheus.number(expr, at) == value for expr, value in values.items())
            return Moment(at, rows) if quiet else None

        return self._prometheus.wait(look, "a scrape of everything")

    def _said_by_engines(self) -> dict[str, int]:
        """What the collector has heard when it has heard everything."""
        engines = self._engines.values()
        return {
            "sum(glasshouse_engine_requests_running)": sum(engine.in_flight for engine in engines),
            "sum(glasshouse_engine_tokens_total)": sum(engine.prompt_tokens + engine.generated_tokens for engine in engines),
            "sum(glasshouse_engine_prefix_cache_hits_total)": sum(engine.cached_tokens for engine in engines),
        }

    def wait_for_rules(self, series: int) -> None:
        """Until what engines compute is recorded: it is 0 from the start, and a new Prometheus doesn't see its first moments."""
        counted = "count(series:glasshouse_engine_tokens_total:from_zero)"
        self._prometheus.wait(lambda: self._prometheus.number(counted) == series, "the rules to record the engines")

    def counted(self, since: float) -> float:
        """The time of an evaluation of the rules, not before this one, that has every count as it is."""

        def look() -> float | None:
            at = self._prometheus.number("max(timestamp(series:glasshouse_requests_total:from_zero))")
            return at if at >= since and all(self._recorded(name, at) for name in COUNTED) else None

        return self._prometheus.wait(look, "the rules to count everything")

    def _recorded(self, name: str, at: float) -> bool:
        return self._series(f"series:{name}:from_zero", at) == self._series(name, at)

    def _series(self, name: str, at: float) -> dict[frozenset[tuple[str, str]], float]:
        return {frozenset(found.labels.items() - {("__name__", name)}): found.value for found in self._prometheus.query(name, at)}


@dataclass
class Run:
    """What happened, and what Prometheus and the ledger say of it. Times are unix seconds."""

    prometheus: Prometheus
    began: float
    first: Moment
    """Some of everything that goes well has been."""
    well: Moment
    """The same again."""
    well_counted: float
    births: Moment
    """Then some of everything that goes wrong: whatever is counted later was there before."""
    end: Moment
    end_counted: float
    worker: Heartbeat
    """What it says at the end."""
    engines: Mapping[str, ScriptedVLLM]
    in_hand: dict[str, int]
    """Backend → streams that hang there at the end."""
    turned_away: Counter[str]
    configured_unix_ns: int


@pytest.fixture(scope="module")
def run(shared_glasshouse: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    tool("prometheus")  # before anything is started for it
    with ExitStack() as stack:
        engines = {name: stack.enter_context(ScriptedVLLM(models=MODELS)) for name in BACKENDS}
        proxy = shared_glasshouse(
            [{"name": name, "url": engine.url} for name, engine in engines.items()],
            {
                **LIMITS,
                "models": dict.fromkeys(MODELS, PRICE),
                "currency": "EUR",
                "cache": {"scope": "team"},
                "timeouts": {"first_byte": 4, "between_chunks": 600},
                "routing": {"policy": "round_robin"},
                "health": {"ejection": 0.1, "longest_ejection": 0.2, "slow_start": 0},
            },
        )
        callers = Callers(proxy)
        began = round(time.time(), 3)
        prometheus = stack.enter_context(
            Prometheus(tmp_path_factory.mktemp("prometheus"), configuration(proxy, tmp_path_factory))
        )
        watcher = Watcher(prometheus, proxy, engines)
        watcher.scraped()
        watcher.wait_for_rules(2 * len(BACKENDS))

        callers.do_well()
        first = watcher.scraped()
        callers.do_well()
        well = watcher.scraped()
        well_counted = watcher.counted(well.at)

        with callers.hold("alice") as crashing:
            crashing.read(events=2)
            proxy.wait_replaced("worker", proxy.kill("worker"))
        proxy.wait_ready()
        callers.do_badly()
        well_again(proxy)
        births = watcher.scraped(turned_away=callers.turned_away.total())

        callers.do_well()
        callers.do_badly()
        well_again(proxy)
        for key in KEYS:
            stack.enter_context(callers.hold(key)).read(events=2)
        put_aside(proxy)
        end = watcher.scraped(held=len(KEYS), turned_away=callers.turned_away.total())
        end_counted = watcher.counted(end.at)
        yield Run(
            prometheus,
            began,
            first,
            well,
            well_counted,
            births,
            end,
            end_counted,
            callers.worker(),
            engines,
            {name: engine.in_flight for name, engine in engines.items()},
            callers.turned_away,
            LastReload.read(proxy.settings.last_reload_path).success_unix_ns,
        )


SET_ASIDE, DAMAGED = 3, 2


def well_again(proxy: Glasshouse) -> None:
    """All backends are back: of those that hang only one request a second finds out."""
    proxy.wait_metric("glasshouse_backend_state", len(BACKENDS), state="up")


def put_aside(proxy: Glasshouse) -> None:
    """What is there when a database refused records and a disk forgot bytes."""
    unstored = proxy.settings.state_path / "unstored"
    unstored.mkdir()
    for number in range(SET_ASIDE):
        (unstored / f"{number}.record").touch()
    for number in range(DAMAGED):
        (proxy.settings.journal_path / f"{number}.seg.damaged").touch()


def configuration(proxy: Glasshouse, temporary: pytest.TempPathFactory) -> dict[str, Any]:
    """The shipped one, at the tests' pace and at this Glasshouse."""
    shipped = DASHBOARDS / "prometheus"
    rules = temporary.mktemp("rules") / "glasshouse.rules.yml"
    rules.write_text(paced((shipped / "glasshouse.rules.yml").read_text()))
    config: dict[str, Any] = yaml.safe_load(paced((shipped / "prometheus.yml").read_text()))
    config["rule_files"] = [str(rules)]
    [scraped] = config["scrape_configs"]
    scraped["static_configs"] = [{"targets": [proxy.settings.metrics.listen]}]
    return config


def paced(text: str) -> str:
    return re.sub(r"\b30s\b", "5s", re.sub(r"\b15s\b", "1s", text))


def labelled(row: Row) -> Row:
    """A row, with what Prometheus calls its model, backend, key and team, and the limit that refused it."""
    model = row["model"] if row["model"] in MODELS else "other" if row["model"] else "none"
    level, _, limit = row["refused_by"].partition(".")
    who = {"key": row["key_name"], "team": row["team"] or "none"}
    place = {"model": model, "backend": row["backend"] or "none", "result": row["cache"]}
    return {**row, **place, **who, "level": level, "limit": limit}


# -- what the ledger says --

Limits = tuple[float, float]
"""The lowest and the highest value that is right."""
Said = Mapping[tuple[str, ...], float | Limits]
"""Values of the labels, in the order of their names → what is said of that series."""


@dataclass
class Ledger:
    """What there is to say at the end, of what the variables choose. `variables`: those that the question follows."""

    run: Run
    choice: Mapping[str, str]
    variables: frozenset[str]

    def chosen(self, name: str, value: str) -> bool:
        return name not in self.variables or re.fullmatch(self.choice[name], value) is not None

    def _follow(self, rows: Iterable[Row]) -> list[Row]:
        return [row for row in rows if all(self.chosen(name, row[name]) for name in self.variables)]

    @cached_property
    def rows(self) -> list[Row]:
        return self._follow(self.run.end.rows)

    @cached_property
    def latest(self) -> list[Row]:
        """Of the last part of the run, which the histograms are compared for."""
        before = {row["id"] for row in self.run.births.rows}
        return self._follow(row for row in self.run.end.rows if row["id"] not in before)

    @property
    def seconds(self) -> float:
        return round(self.run.end_counted - self.run.began, 3)

    def sums(self, *by: str, of: Callable[[Row], int] = lambda row: 1) -> dict[tuple[str, ...], float]:
        found: defaultdict[tuple[str, ...], float] = defaultdict(float)
        for row in self.rows:
            if amount := of(row):
                found[tuple(row[name] for name in by)] += amount
        return found

    def cost(self, *by: str) -> dict[tuple[str, ...], float]:
        return {labels: nano / NANO for labels, nano in self.sums(*by, of=lambda row: int(row["cost_nano"])).items()}

    def tokens(self) -> Said:
        columns = {"input": "input_tokens", "cached_input": "cached_tokens", "output": "output_tokens"}
        return self.rates({(kind,): sum(row[column] for row in self.rows) for kind, column in columns.items()})

    def attempts(self, retried: bool = False) -> Said:
        """Those that brought no answer and whose client had not left; or that another one followed."""
        tried = [row["attempts"][:-1] if retried else row["attempts"] for row in self.run.end.rows]
        everything = [attempt for attempts in tried for attempt in attempts if self.chosen("backend", attempt["backend"])]
        results = Counter((attempt["backend"], result(attempt)) for attempt in everything)
        failed: dict[tuple[str, ...], float] = {
            labels: count for labels, count in results.items() if retried or not re.match("ok$|client_", labels[1])
        }
        return self.rates(failed) or {("none", "failed"): 0}

    def accepted(self) -> Said:
        """By worker: what has ended and what hangs, but for what a killed one could not tell any more."""
        least, most = len(self.run.first.rows), len(self.run.end.rows) + len(KEYS)
        return {("0",): (least / self.seconds, most / self.seconds)}

    def backends(self, read: Callable[[BackendBeat], float]) -> dict[tuple[str, ...], float]:
        """What the worker says of them."""
        return {(name,): read(beat) for name, beat in self.run.worker.backends.items() if self.chosen("backend", name)}

    def happened(self, read: Callable[[BackendBeat], float]) -> Said:
        """What the worker counted, of those to which it happened."""
        return {labels: count for labels, count in self.backends(read).items() if count} or {("none",): 0}

    def engines(self, read: Callable[[ScriptedVLLM], float]) -> dict[tuple[str, ...], float]:
        """What the engines know themselves."""
        return {(name,): read(engine) for name, engine in self.run.engines.items() if self.chosen("backend", name)}

    def computed(self) -> Said:
        kinds: dict[str, Callable[[ScriptedVLLM], float]] = {
            "input": lambda engine: engine.prompt_tokens,
            "output": lambda engine: engine.generated_tokens,
        }
        return self.rates({(*name, kind): tokens for kind, read in kinds.items() for name, tokens in self.engines(read).items()})

    def cached(self) -> Said:
        """Of the prompts, by backend."""
        cached = self.sums("backend", of=lambda row: row["cached_tokens"])
        read = self.sums("backend", of=lambda row: row["input_tokens"])
        return {labels: cached.get(labels, 0) / tokens for labels, tokens in read.items()}

    def answered(self) -> Said:
        """By the cache, of what it was asked."""
        results = Counter(row["result"] for row in self.rows if row["result"])
        asked = results.total() - results["bypass"]
        if not results:
            return {(): 0}
        return {(): (results["hit"] + results["coalesced"]) / asked} if asked else {}

    def saved(self, *by: str, of: str) -> dict[tuple[str, ...], float]:
        return {labels: nano / NANO for labels, nano in self.sums(*by, of=lambda row: int(row[of])).items()}

    def saved_tokens(self) -> Said:
        kinds: dict[tuple[str, ...], float] = {
            (kind,): sum(row[f"saved_{kind}_tokens"] for row in self.rows) for kind in ("input", "output")
        }
        return self.rates({labels: count for labels, count in kinds.items() if count}) or {("none",): 0}

    def refused(self, *by: str) -> dict[tuple[str, ...], float]:
        return self.sums(*by, of=lambda row: row["limit"] != "")

    def over_budget(self) -> dict[tuple[str, ...], float]:
        return self.sums("key", of=lambda row: row["over_budget"] != "")

    def rates(self, sums: Mapping[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
        return {labels: value / self.seconds for labels, value in sums.items()}

    def quantile(self, share: float, metric: str, value: Callable[[Row], float | None], *by: str) -> Said:
        """Of a value, in ns, of the latest rows that have one."""
        counts: defaultdict[tuple[str, ...], list[int]] = defaultdict(lambda: [0] * (len(EDGES[metric]) - 1))
        for row in self.latest:
            if (found := value(row)) is not None:
                counts[tuple(row[name] for name in by)][bisect_left(EDGES[metric][1:], found)] += 1
        return {labels: between(counted, EDGES[metric], share) for labels, counted in counts.items()}

    def gaps(self, share: float) -> Said:
        """Between tokens, by backend."""
        edges = EDGES["glasshouse_inter_token_latency_seconds"]
        counts: dict[tuple[str, ...], list[int]] = {}
        for row in self.latest:
            if row["inter_token_counts"]:
                before = counts.get((row["backend"],), [0] * (len(edges) - 1))
                counts[(row["backend"],)] = [a + b for a, b in zip(before, row["inter_token_counts"], strict=True)]
        return {labels: between(counted, edges, share) for labels, counted in counts.items()}


def between(counts: list[int], edges: list[float], share: float) -> Limits:
    """Seconds between which this share's quantile lies: the edges of the bucket of the value that has its rank; if the rank falls
    between two values, of theirs."""
    rank = share * sum(counts)
    lowest, highest = math.ceil(rank * 0.999), min(sum(counts), math.ceil(rank * 1.001))
    total, low, high = 0, 0.0, math.inf
    for count, (lower, upper) in zip(counts, pairwise(edges), strict=True):
        if total < lowest <= total + count:
            low = lower / NANO
        if total < highest <= total + count:
            high = upper / NANO
        total += count
    return low, high


def result(attempt: Mapping[str, Any]) -> str:
    status = f"http_{attempt['status']}" if attempt["status"] >= 400 else "ok" if attempt["ended_ns"] else "unfinished"
    return attempt["error"] or status


def first_token(row: Row) -> float | None:
    return None if row["result"] in ("hit", "coalesced") else row["first_token_ns"] or None


def duration(row: Row) -> float | None:
    return row["ended_ns"] if row["outcome"] in ("ok", "cached", "coalesced") else None


def added(row: Row) -> float | None:
    return row["proxy_added_ns"] if row["sent_ns"] and row["outcome"] != "crashed" else None


def engine(column: str) -> Callable[[Row], float | None]:
    return lambda row: None if row[column] is None else round(row[column] * 1e6)


def from_callers(row: Row) -> bool:
    return bool(row["key"] != PROBES)


def from_cache(row: Row) -> float | None:
    """The first token of a stream that no engine was asked for."""
    if not row["stream"] or row["result"] not in ("hit", "coalesced"):
        return None
    return row["first_token_ns"] or (row["looked_up_ns"] if row["result"] == "hit" else None)


def looked_up(row: Row) -> float | None:
    return row["looked_up_ns"] - row["admitted_ns"] if row["looked_up_ns"] else None


def age(row: Row) -> float | None:
    return row["age_ns"] if row["result"] == "hit" else None


def waited(row: Row) -> float | None:
    if not row["queued_ns"]:
        return 0 if row["routed_by"] else None
    return float((row["attempts"][0]["started_ns"] if row["attempts"] else row["ended_ns"]) - row["queued_ns"])


TTFT: Final = "glasshouse_time_to_first_token_seconds"
ADDED: Final = "glasshouse_proxy_added_seconds"
WAIT: Final = "glasshouse_request_wait_seconds"
ENGINE: Final = "glasshouse_engine_{}_seconds"
CACHE: Final = "glasshouse_cache_{}_seconds"

ANSWERS: Final[dict[str, list[Callable[[Ledger], Said]]]] = {
    "Are requests answered?": [lambda say: say.rates(say.sums("outcome", of=from_callers))],
    "What share of them fails?": [lambda say: {(): mean(row["outcome"] in FAILED for row in say.rows if from_callers(row))}],
    "With which errors?": [
        lambda say: say.rates(say.sums("error_code", of=lambda row: row["error_code"] != "" and from_callers(row)))
    ],
    "How long until the first token?": [
        lambda say: say.quantile(0.5, TTFT, first_token),
        lambda say: say.quantile(0.95, TTFT, first_token),
        lambda say: say.quantile(0.99, TTFT, first_token),
    ],
    "Do streams stall?": [lambda say: say.gaps(0.99)],
    "How long do whole answers take?": [
        lambda say: say.quantile(0.95, "glasshouse_request_duration_seconds", duration, "operation")
    ],
    "How many tokens flow?": [lambda say: say.tokens()],
    "What does it cost an hour?": [lambda say: {labels: 3600 * rate for labels, rate in say.rates(say.cost("currency")).items()}],
    "What did it cost in this time?": [lambda say: say.cost("currency")],
    "What is each of them working on?": [
        lambda say: {(name,): count for name, count in say.run.in_hand.items() if say.chosen("backend", name)}
    ],
    "Is one of them slower?": [lambda say: say.quantile(0.95, TTFT, first_token, "backend")],
    "Does one of them fail?": [lambda say: say.attempts()],
    "Which backends are in service?": [lambda say: say.backends(lambda beat: 0)],
    "Where do requests go, and why?": [
        lambda say: say.rates(say.sums("backend", "routed_by", of=lambda row: row["routed_by"] != ""))
    ],
    "How much has each of them to do?": [
        lambda say: say.backends(lambda beat: beat.tokens),
        lambda say: say.backends(lambda beat: beat.prefilling),
        lambda say: say.backends(lambda beat: 1),
    ],
    "Do requests wait for a backend?": [
        lambda say: {(): 0},
        lambda say: say.rates(say.sums(of=lambda row: row["queued_ns"] > 0)) or {(): 0},
    ],
    "For how long?": [lambda say: say.quantile(0.5, WAIT, waited), lambda say: say.quantile(0.99, WAIT, waited)],
    "Do prompts meet their cache?": [lambda say: say.cached()],
    "What is tried again?": [
        lambda say: say.attempts(retried=True),
        lambda say: say.rates({(): say.run.worker.retries_denied}),
        lambda say: {("another", "none"): 0},
    ],
    "Which of them had to leave?": [
        lambda say: say.happened(lambda beat: beat.ejections),
        lambda say: say.happened(lambda beat: beat.failed_probes),
    ],
    "What are they computing, and what waits?": [
        lambda say: say.engines(lambda engine: engine.in_flight),
        lambda say: say.engines(lambda engine: 0),
    ],
    "Is there room in their KV caches?": [lambda say: say.engines(lambda engine: 0)],
    "How much do they find in their prefix caches?": [
        lambda say: say.engines(lambda engine: engine.cached_tokens / engine.prompt_tokens)
    ],
    "How fast are they?": [lambda say: say.computed()],
    "Do they answer when they are asked?": [lambda say: {("none", "failed"): 0}],
    "Since when do they run?": [lambda say: say.engines(lambda engine: engine.started_unix_s * 1000)],
    "How often does it have the answer?": [lambda say: say.answered()],
    "What becomes of the requests?": [
        lambda say: say.rates(say.sums("result", of=lambda row: row["result"] != "")) or {("none",): 0},
        lambda say: say.rates(say.sums(of=lambda row: row["similarity"] is not None)) or {(): 0},
    ],
    "How long until their first token?": [
        lambda say: say.quantile(0.95, CACHE.format("time_to_first_token"), from_cache, "result") or {("none",): 0}
    ],
    "How many tokens does it save?": [lambda say: say.saved_tokens()],
    "What did it save in this time?": [
        lambda say: say.saved("currency", of="saved_cost_nano") or {("money",): 0},
        lambda say: say.saved(of="saved_ns") or {(): 0},
    ],
    "How old are the answers?": [
        lambda say: say.quantile(0.5, CACHE.format("age"), age) or {(): 0},
        lambda say: say.quantile(0.99, CACHE.format("age"), age) or {(): 0},
    ],
    "How much does it keep?": [
        lambda say: {(): say.run.worker.cache_entries},
        lambda say: {(): say.run.worker.cache_bytes},
    ],
    "What comes, and what has to go?": [
        lambda say: say.rates({(): sum(row["result"] == "miss" and row["outcome"] == "ok" for row in say.run.end.rows)}),
        lambda say: say.rates({(): say.run.worker.cache_evictions}),
        lambda say: say.rates({(): say.run.worker.cache_dropped}),
    ],
    "Does looking take long?": [
        lambda say: say.quantile(0.99, CACHE.format("lookup"), looked_up) or {(): 0},
        lambda say: say.rates({(): say.run.worker.cache_redis_failures}),
        lambda say: {},
    ],
    "Which keys cost most?": [lambda say: say.cost("currency", "key")],
    "Which keys use most tokens?": [lambda say: say.sums("key", of=lambda row: row["input_tokens"] + row["output_tokens"])],
    "Which keys send most requests?": [lambda say: say.sums("key")],
    "Which teams cost most?": [lambda say: say.cost("currency", "team")],
    "Which teams use most tokens?": [lambda say: say.sums("team", of=lambda row: row["input_tokens"] + row["output_tokens"])],
    "Which limits refuse requests?": [lambda say: say.rates(say.refused("level", "limit"))],
    "Whose requests are they?": [lambda say: say.refused("key"), lambda say: say.over_budget()],
    "Do the workers share the limits?": [
        lambda say: {(): 0},
        lambda say: {},
        lambda say: {(): 0},
        lambda say: {(): len(MEMBERS)},
    ],
    "What does the proxy add?": [lambda say: say.quantile(0.5, ADDED, added), lambda say: say.quantile(0.99, ADDED, added)],
    "Is the record behind?": [
        lambda say: {("ledger",): (0, 1), ("metrics",): (0, 1)},
        lambda say: {("ledger",): 0, ("metrics",): 0},
    ],
    "What is turned away at the door?": [lambda say: say.rates({(code,): count for code, count in say.run.turned_away.items()})],
    "Where do the engines spend the time?": [
        lambda say: say.quantile(0.95, ENGINE.format("queue"), engine("engine_queue_ms")),
        lambda say: say.quantile(0.95, ENGINE.format("prefill"), engine("engine_prefill_ms")),
        lambda say: say.quantile(0.95, ENGINE.format("decode"), engine("engine_decode_ms")),
    ],
    "How many clients are there?": [lambda say: {(): len(KEYS)}, lambda say: {(): len(KEYS)}],
    "Do the workers keep up?": [lambda say: {(): (0, 10)}],
    "Do the workers share the work?": [lambda say: say.accepted()],
    "Do they share the clients?": [lambda say: {("0",): len(KEYS)}],
    "Is every sink up?": [lambda say: {("ledger",): 1, ("metrics",): 1}],
    "Are the workers there?": [lambda say: {(): 1}, lambda say: {(): 0}, lambda say: {(): (0, 10)}],
    "Has anything been lost?": [
        lambda say: {(): 0},
        lambda say: {(): 0},
        lambda say: {(): SET_ASIDE},
        lambda say: {(): DAMAGED},
        lambda say: {(): 0},
    ],
    "Do the workers know today's keys?": [lambda say: {(): (0, 60)}],
    "Are configuration and certificate in force?": [
        lambda say: {(): 1},
        lambda say: {(): say.run.configured_unix_ns / 1e6},
        lambda say: {},
    ],
    "Which version runs?": [lambda say: {(__version__,): 1}],
}
"""A panel → what the ledger, or whoever else knows, says to each of its queries."""

ABSENT: Final = {"certificate", "Redis"}
"""Legends of queries that this run has nothing for: it has no TLS and no Redis. They are never all that a panel has."""


# -- the questions --


def written_out(expr: str, seconds: float, choice: Mapping[str, str]) -> str:
    """A query as Grafana sends it."""
    values = {"__rate_interval": f"{seconds * 1000:.0f}ms", "__range": f"{seconds * 1000:.0f}ms", "__interval": "1s", **choice}
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], expr)


def variables(expr: str) -> frozenset[str]:
    return frozenset(CHOICES[0]) & set(re.findall(r"\$(\w+)", expr))


def asked(title: str) -> list[dict[str, Any]]:
    """The queries of a panel that have an answer here; at least one."""
    targets = [target for target in PANELS[title]["targets"] if target["legendFormat"] not in ABSENT]
    assert targets
    return targets


def is_counted(expr: str) -> bool:
    return ":from_zero" in expr


@pytest.mark.parametrize("choice", CHOICES, ids=["everything", "one of each", "several"])
@pytest.mark.parametrize("title", PANELS)
def test_a_panel_says_what_the_ledger_says(run: Run, title: str, choice: Mapping[str, str]) -> None:
    for target, answer in zip(PANELS[title]["targets"], ANSWERS[title], strict=True):
        expr = target["expr"]
        ledger = Ledger(run, choice, variables(expr))
        at, seconds = (run.end_counted, ledger.seconds) if is_counted(expr) else (run.end.at, run.end.at - run.births.at + 0.001)
        found = run.prometheus.query(written_out(expr, seconds, choice), at)
        values = {tuple(value for _, value in sorted(series.labels.items())): series.value for series in found}
        said = answer(ledger)
        assert values.keys() == said.keys(), expr
        assert bool(values) == (target["legendFormat"] not in ABSENT), expr
        for labels, value in values.items():
            expected = said[labels]
            if isinstance(expected, tuple):
                low, high = expected
                assert low * (1 - 1e-9) <= value <= high * (1 + 1e-9), (expr, labels)
            else:
                assert value == pytest.approx(expected, rel=1e-9, abs=1e-12), (expr, labels)


@pytest.mark.parametrize("title", PANELS)
def test_no_panel_is_empty_while_all_is_well(run: Run, title: str) -> None:
    for target in asked(title):
        expr = target["expr"]
        at, since = (run.well_counted, run.began) if is_counted(expr) else (run.well.at, run.first.at)
        found = run.prometheus.query(written_out(expr, at - since + 0.001, CHOICES[0]), at)
        assert found, expr
        assert not [series for series in found if math.isnan(series.value)], expr


@pytest.mark.parametrize("title", PANELS)
def test_a_panel_can_be_drawn(run: Run, title: str) -> None:
    """Over the whole run in Grafana's way: four scrapes for a rate, and a name for each line made of labels that it has."""
    for target in asked(title):
        drawn = run.prometheus.range(written_out(target["expr"], 4, CHOICES[0]), run.began, run.end_counted, 1)
        assert drawn, target["expr"]
        for series in drawn:
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= series.labels.keys()


def test_the_counters_themselves_are_the_ledgers_sums(run: Run) -> None:
    rows, at = run.end.rows, run.end.at
    outcomes = {"ok", "cached", "client_error", "rejected", "client_gone", "upstream_error", "timeout", "crashed"}
    assert {row["outcome"] for row in rows} >= outcomes
    assert run.prometheus.number("sum(glasshouse_requests_total)", at) == len(rows)
    for kind, column in (("input", "input_tokens"), ("cached_input", "cached_tokens"), ("output", "output_tokens")):
        assert run.prometheus.number(f'sum(glasshouse_tokens_total{{kind="{kind}"}})', at) == sum(row[column] for row in rows) > 0
    for key in KEYS:
        cost = run.prometheus.number(f'sum(glasshouse_cost_total{{key="{key}", currency="EUR"}})', at)
        assert round(cost * NANO) == sum(row["cost_nano"] for row in rows if row["key"] == key) > 0


def test_there_is_something_of_every_kind_of_limit(run: Run) -> None:
    rows = run.end.rows
    assert Counter((row["key"], row["refused_by"]) for row in rows if row["outcome"] == "rejected") == {
        ("alice", "team.budget"): 2,
        ("bob", "team.budget"): 2,
        ("bob", "key.max_input_tokens"): 2,
    }
    over = [row for row in rows if row["over_budget"]]
    assert {(row["key"], row["team"], row["over_budget"]) for row in over} == {(key, TEAM, "team") for key in MEMBERS}
    assert {row["key"] for row in rows if row["team"] == "none"} == {*KEYS, PROBES} - set(MEMBERS)


def test_what_is_new_is_recorded_from_zero(run: Run) -> None:
    """All of this run was new to Prometheus: the recorded series begin at nothing and end with everything."""
    for name in ("glasshouse_requests_total", "glasshouse_tokens_total", "glasshouse_cost_total"):
        window = f"{run.end_counted - run.began:.0f}s"
        lowest = run.prometheus.query(f"min_over_time(series:{name}:from_zero[{window}])", run.end_counted)
        assert {series.value for series in lowest} == {0}
        assert len(lowest) == run.prometheus.number(f"count({name})", run.end.at)


def test_a_variable_offers_what_there_is(run: Run) -> None:
    queries = [each["query"]["query"] for each in BOARD["templating"]["list"] if each["type"] == "query"]
    offered = {}
    for query in queries:
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()  # type: ignore[union-attr]
        offered[label] = {series.labels[label] for series in run.prometheus.query(f"group by ({label}) ({metric})", run.end.at)}
    assert offered == {"model": {*MODELS, "other", "none"}, "backend": {*BACKENDS, "none"}, "key": {*KEYS, PROBES}}


def test_a_dot_leads_to_the_trace_of_a_request(run: Run) -> None:
    labels = run.prometheus.exemplars("glasshouse_time_to_first_token_seconds_bucket", run.began, run.end_counted)
    traces = {row["trace_id"] for row in run.end.rows}
    assert labels
    assert {each["trace_id"] for each in labels} <= traces


# failure 79
def test_whoever_invents_names_makes_no_series(glasshouse: Start) -> None:
    with ScriptedVLLM() as vllm:
        proxy = glasshouse([vllm.url])
        dice = random.Random(79)
        names = ["".join(dice.choices(string.ascii_letters + string.digits, k=12)) for _ in range(101)]
        series = []
        for number, name in enumerate(names, 1):
            assert ask(proxy.url, CHAT, chat(name), key=proxy.key).status == 404
            assert ask(proxy.url, f"/v1/{name}", chat("smollm2"), key=proxy.key).status == 404
            if number in (1, len(names)):
                proxy.wait_metric("glasshouse_requests_total", number)
                proxy.wait_metric("glasshouse_unaccepted_requests_total", number)
                proxy.wait_metric("glasshouse_engine_scrapes_total", 1)
                metrics = proxy.metrics()
                series.append({(each.name, *sorted(each.labels.items())) for each in metrics})
        assert series[0] == series[1]
        assert metrics.total("glasshouse_requests_total", model="other") == len(names)
