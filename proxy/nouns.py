"""What people declare: teams, users, projects, keys, models, backends, prices and budgets.

The same words everywhere: a section of `glasshouse.yaml`, a body of the control API, and a row of the catalogue hold the same
structure, and are checked by it. A bad value raises `msgspec.ValidationError`.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import Meta, Struct

Price = Annotated[Decimal, Meta()]
_END = r"$(?!\n)"
"""`$` alone also matches before a line feed at the end."""
NAME = rf"^[A-Za-z0-9][A-Za-z0-9._-]{{0,63}}{_END}"
Name = Annotated[str, Meta(pattern=NAME)]
Tag = Annotated[str, Meta(pattern=rf"^[A-Za-z0-9][A-Za-z0-9._:/=-]{{0,63}}{_END}")]
MODEL_NAME = rf"^[^\s\x00-\x1f\x7f]{{1,256}}{_END}"
ModelName = Annotated[str, Meta(pattern=MODEL_NAME)]
Count = Annotated[int, Meta(ge=1, le=10**15)]
"""Of whatever. The most is as good as no limit, and a thousand times as many still fit into 63 bits."""
CountOrNone = Annotated[int, Meta(ge=0, le=10**15)]
_EARLIEST, _LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
_PATTERN = frozenset("*?[")
"""What makes a name a pattern, as of a shell: `*`, `?`, `[abc]`; upper and lower case differ."""
Json = bool | int | float | str | list[Any] | dict[str, Any] | None
OperationName = Literal[
    "chat",
    "completions",
    "responses",
    "messages",
    "count_tokens",
    "embeddings",
    "rerank",
    "score",
    "transcriptions",
    "translations",
    "tokenize",
    "detokenize",
]
"""What engines are asked for, as rows of the ledger call it. The list of models isn't among it: who has a key may see it."""


def is_pattern(name: str) -> bool:
    """Whether what a backend is declared to serve stands for many models (`gpt-*`)."""
    return not _PATTERN.isdisjoint(name)


def covering(patterns: Iterable[str], name: str) -> str | None:
    """The longest of the patterns that match a name; None if none does."""
    matching = (pattern for pattern in patterns if fnmatchcase(name, pattern))
    return max(matching, key=lambda pattern: (len(pattern), pattern), default=None)


PolicyName = Literal["auto", "least_loaded", "prefix_affinity", "round_robin", "session", "weighted"]
"""Who of several backends is to answer: `proxy/routing/policies`."""
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
PriorityName = Literal["high", "normal", "low"]
PRIORITIES: tuple[PriorityName, ...] = get_args(PriorityName)
Weight = Annotated[float, Meta(ge=0.001, le=1000)]


CachePolicyName = Literal["off", "deterministic", "all"]
"""Which answers may be given again; each allows what those before it do."""
CACHE_POLICIES: tuple[CachePolicyName, ...] = get_args(CachePolicyName)
CacheScopeName = Literal["key", "team", "everyone"]
IsolationName = Literal["key", "team"]
"""Who may have use of the prompts that an engine has already computed."""
ISOLATIONS: tuple[IsolationName, ...] = get_args(IsolationName)
EngineParameter = Literal[
    "cache_salt",
    "priority",
    "kv_transfer_params",
    "ec_transfer_params",
    "namespace",
    "vllm_xargs",
    "data_parallel_rank",
    "request_id",
]
"""What engines take in a request's body and what is for whoever runs them to say, not for callers."""
Ttl = Annotated[float, Meta(ge=1, le=30 * 86_400)]
"""Seconds."""


class SemanticCacheSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An answer to a question that means the same. `model`: who makes embeddings, of those served here. `threshold`: the cosine
    from which on two questions count as the same."""

    model: ModelName
    threshold: Annotated[float, Meta(gt=0, le=1)] = 0.95


class ModelCacheSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one model, instead of what `cache` says of all.

    revision: anything that changes when the model's answers do, for what the proxy can't see (weights replaced under one name).
    """

    policy: CachePolicyName | None = None
    scope: CacheScopeName | None = None
    ttl: Ttl | None = None
    revision: str = ""
    semantic: SemanticCacheSettings | None = None


class BackendSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One inference server. `url` is its root, with or without `/v1`. `ca_file`: the authorities (PEM) that may vouch for an
    `https` one, instead of the system's.

    models: what may be asked of it, names or patterns (`gpt-*`); nothing: what it lists itself.
    weight: how much it may do, against others.
    depth: requests that this host sends it at a time; more wait here, where they are put in order. Of a vLLM 256 unless said
    otherwise, as many as it takes up at a time by default (`--max-num-seqs`); of others as many as come.
    prefill_tokens: prompt tokens that one key may have it compute at a time while others are at work too.
    """

    url: str
    name: Name | None = None
    kind: Literal["auto", "vllm", "openai"] = "auto"
    models: list[str] = []
    api_key_env: str | None = None
    ca_file: str | None = None
    weight: Weight = 1.0
    depth: Count | None = None
    prefill_tokens: Count = 8192

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
            raise ValueError(f"{self.url!r} is not usable as a backend URL; allowed: http[s]://HOST[:PORT][/PATH]")
        try:
            _ = parts.port
        except ValueError:
            raise ValueError(f"{self.url!r} has a port outside 1..65535") from None
        if self.ca_file is not None and parts.scheme != "https":
            raise ValueError(f"ca_file: {self.ca_file!r} is of no use with {self.url!r}; allowed: with an https:// url")


class RunTimeSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is said of a backend while everything runs, wherever it is declared. It holds for whatever has the backend's name.

    drained: it gets no more requests; those that it has go on.
    weight: instead of the declared one.
    """

    drained: bool = False
    weight: Weight | None = None


class PriceSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Per million tokens, in `currency`. Cached input defaults to the input price.

    `from`: a row of the price list, which fills in what isn't said beside it (`Settings.of` does that).
    """

    from_: str | None = msgspec.field(default=None, name="from")
    input: Price = Decimal(0)
    cached_input: Price | None = None
    output: Price = Decimal(0)

    def __post_init__(self) -> None:
        for field in ("input", "cached_input", "output"):
            value = getattr(self, field)
            if value is not None and not (value.is_finite() and 0 <= value <= 1_000_000):
                raise ValueError(f"{field}: {value} is not a price; allowed: 0 to 1000000 per million tokens")

    @property
    def cached(self) -> Decimal:
        """What cached input costs."""
        return self.input if self.cached_input is None else self.cached_input


class BoundsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one request may ask for; what isn't set is as in `proxy.snapshot.Bounds`. A model's own come before those of all."""

    n: Count | None = None
    max_tokens: Count | None = None
    logprobs: CountOrNone | None = None
    stop: CountOrNone | None = None
    tools: CountOrNone | None = None
    schema_bytes: CountOrNone | None = None


class DatedPriceSettings(PriceSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A price for requests received at `valid_from` or later, until the next one's."""

    valid_from: Annotated[datetime, Meta(tz=True)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _EARLIEST <= self.valid_from <= _LATEST:
            raise ValueError(f"valid_from: {self.valid_from.isoformat()} is not allowed; allowed: from 1970 to 2200")


NOT_DEFAULTS = frozenset(
    {"model", "messages", "prompt", "input", "query", "documents", "file", "stream", "stream_options", "user"}
)
"""What only a caller can say."""


class ModelSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model without a price costs nothing.

    price: at any time before the first of `prices`.
    prices: later ones, each from its moment on.
    fallbacks: models that are asked instead, one after the other, when no backend can answer for this one.
    policy: who of several backends is to answer, instead of `routing.policy`.
    aliases: other names under which it may be asked for. A model that a backend serves under such a name comes first.
    defaults: parameters that are added to requests that don't say them (`temperature`, `max_tokens`, ...).
    assumed_output_tokens: what limits and budgets set aside for an answer whose request doesn't say how long it may become.
    cache: which answers may be given again, instead of what `cache` says of all models.
    prefix_isolation: engines reuse computed prompts (vLLM's prefix cache) for one key, or one team, only, and not for whoever
    asks: by how fast an answer begins nobody can tell then what others have asked.
    """

    price: PriceSettings | None = None
    prices: tuple[DatedPriceSettings, ...] = ()
    aliases: tuple[ModelName, ...] = ()
    defaults: dict[str, Json] = {}
    bounds: BoundsSettings = BoundsSettings()
    assumed_output_tokens: Count = 1024
    policy: PolicyName | None = None
    fallbacks: tuple[ModelName, ...] = ()
    cache: ModelCacheSettings = ModelCacheSettings()
    prefix_isolation: IsolationName | None = None

    def __post_init__(self) -> None:
        if wrong := sorted(self.defaults.keys() & NOT_DEFAULTS):
            raise ValueError(f"defaults: {wrong[0]!r} is for callers to say; allowed: any other parameter")
        moments = [each.valid_from for each in self.prices]
        if len(set(moments)) != len(moments):
            raise ValueError("prices: two are valid from the same moment; allowed: one for each valid_from")
        if twice := [each for at, each in enumerate(self.fallbacks) if each in self.fallbacks[:at]]:
            raise ValueError(f"fallbacks: {twice[0]!r} stands twice; allowed: each once")


class BudgetSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """So much of one thing: `money` (in `currency`), `tokens` (input and output) or `gpu_seconds`, from midnight to midnight in
    `time_zone`; a week begins on Monday. A `soft` one refuses nothing, it is only told of."""

    money: Annotated[Decimal, Meta()] | None = None
    tokens: Count | None = None
    gpu_seconds: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    per: Literal["day", "week", "month", "total"]
    time_zone: str = "UTC"
    soft: bool = False

    def __post_init__(self) -> None:
        said = [name for name in ("money", "tokens", "gpu_seconds") if getattr(self, name) is not None]
        if len(said) != 1:
            raise ValueError(f"a budget of {' and '.join(said) or 'nothing'}; allowed: one of money, tokens, gpu_seconds")
        if self.money is not None and not (self.money.is_finite() and 0 < self.money <= 1_000_000_000):
            raise ValueError(f"money: {self.money} is not an amount; allowed: more than 0, up to 1000000000")
        try:
            ZoneInfo(self.time_zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"time_zone: {self.time_zone!r} is not known; allowed: names such as UTC or Europe/Vienna") from None


class AllowanceSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a key, a team or everyone together may use; what isn't set is not limited. Of all that applies the tightest counts.

    requests_per_minute, ..tokens_per_minute: a minute's worth may come at once; then it fills up again steadily. Tokens are set
    aside when a request comes and set right when it has ended.
    concurrent_requests: from a request's beginning to the last byte of its answer.
    max_input_tokens: of one request.
    models: names or patterns (`qwen*`; `*`, `?`, `[abc]`, upper and lower case differ); others don't exist for the caller.
    operations: what may be asked for.
    expires: from this moment on nothing may be; with its zone, such as 2026-12-31T18:00:00+01:00.
    priority: who is next where requests wait for an engine: all of `high` before all of `normal`, and these before all of `low`.
    cache: which answers may be given again. Of all that is said about it, for the model too, the strictest counts.
    engine_parameters: of the parameters that steer an engine from inside, those that requests may set. What any level allows is
    allowed.
    """

    requests_per_minute: Count | None = None
    input_tokens_per_minute: Count | None = None
    output_tokens_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrent_requests: Count | None = None
    max_input_tokens: Count | None = None
    models: tuple[Annotated[str, Meta(min_length=1)], ...] | None = None
    operations: tuple[OperationName, ...] | None = None
    expires: Annotated[datetime, Meta(tz=True)] | None = None
    budgets: tuple[BudgetSettings, ...] = ()
    priority: PriorityName = "normal"
    cache: CachePolicyName | None = None
    engine_parameters: tuple[EngineParameter, ...] = ()


class TeamSettings(AllowanceSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """People who share limits and budgets. The keys of one that is `blocked` don't work."""

    blocked: bool = False


class MemberSettings(TeamSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a team, or of none."""

    team: Name | None = None


class UserSettings(MemberSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose keys these are. Limits and budgets hold for all keys of the user together."""


class ProjectSettings(MemberSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What keys are for. Limits and budgets hold for all keys of the project together."""


SYSTEM_KEY = "system"
"""What the proxy's own requests are booked to, and so no name for a key."""


class KeySettings(MemberSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the key in use that has this name.

    hash: `sha256:` and 64 hex digits, of the whole secret. With it the key needs no row in the database: the file makes it.
    """

    user: Name | None = None
    project: Name | None = None
    tags: tuple[Tag, ...] = ()
    hash: Annotated[str, Meta(pattern=rf"^sha256:[0-9a-f]{{64}}{_END}")] | None = None
