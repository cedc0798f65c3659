"""Is there a Redis at the address in the settings that several workers can share limits and budgets through?"""

from __future__ import annotations

from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from proxy.settings import RedisSettings

ANSWER_S = 5.0
_PACKS = "return cmsgpack.unpack(cmsgpack.pack(ARGV[1]))"
_POLICY = "maxmemory_policy"
_KEEPS = "noeviction"


def look_at_redis(settings: RedisSettings) -> tuple[str, list[str], list[str]]:
    """→ its version ("" if it can't be used), what is wrong with it, what isn't as good as it could be."""
    waits = {"socket_timeout": ANSWER_S, "socket_connect_timeout": ANSWER_S, "retry": Retry(NoBackoff(), 0)}
    try:
        with Redis.from_url(settings.url, decode_responses=True, **waits) as redis:
            redis.ping()
            facts: dict[str, Any] = redis.info()
            problems = _scripts(redis)
    except (RedisError, OSError) as error:
        return "", [f"{settings.shown} can't be used: {error}"], []
    except (TypeError, ValueError):  # of the client's constructor, which the URL's options are handed to
        return "", [f"{settings.shown} can't be used: the URL's options are none of the client's"], []
    policy = facts.get(_POLICY, _KEEPS)
    remarks = [] if policy == _KEEPS else [_forgets(policy)]
    return str(facts.get("redis_version", "unknown")), [f"{settings.shown}: {text}" for text in problems], remarks


def _scripts(redis: Redis) -> list[str]:
    try:
        packed = redis.eval(_PACKS, 0, "ok")
    except ResponseError as error:
        return [f"it runs no scripts that use cmsgpack: {error}"]
    return [] if packed == "ok" else ["its cmsgpack doesn't work"]


def _forgets(policy: str) -> str:
    return (
        f"maxmemory-policy is {policy!r}: when its memory is full Redis forgets what was spent and set aside, until the workers "
        f"tell it again; better: {_KEEPS}"
    )
