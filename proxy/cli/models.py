"""`glasshouse models`: what may be asked for. What a model costs is in `glasshouse prices`."""

from __future__ import annotations

from proxy.cli.catalogue import NounCommands, in_words, setting, source
from proxy.cli.report import Columns

_COLUMNS: Columns = {
    "NAME": lambda row: row["id"],
    "BACKENDS": lambda row: row["backends"],
    "MAX LENGTH": lambda row: row["max_model_len"],
    "ALIASES": setting("aliases"),
    "POLICY": setting("policy"),
    "FALLBACKS": setting("fallbacks"),
    "CACHE": lambda row: in_words("cache", row["settings"]["cache"]),
    "DEFAULTS": lambda row: in_words("defaults", row["settings"]["defaults"]),
    "INPUT": lambda row: row["price"]["input"],
    "CACHED INPUT": lambda row: row["price"]["cached_input"],
    "OUTPUT": lambda row: row["price"]["output"],
    "PER MILLION TOKENS IN": lambda row: row["price"]["currency"],
    "DECLARED IN": source,
}
_FIELDS = (
    *("aliases", "policy", "fallbacks", "cache_policy", "prefix_isolation", "defaults", "bounds", "assumed_output_tokens"),
)
_NOUN = NounCommands("models", "model", _FIELDS, _COLUMNS, is_there=True)

models = _NOUN.group("What may be asked for: aliases, policies, fallbacks, what is cached, defaults, bounds.", creates=False)
