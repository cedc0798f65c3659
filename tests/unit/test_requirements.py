"""What `requirements.txt` installs is all that Glasshouse needs: a machine for development has much more."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
NOT_IMPORTED: Final = ("proxy.embedded.llama_server", "proxy.embedded.phoenix_server", "proxy.store.migrations.env")
"""Scripts: run by the interpreters of other environments, and by Alembic."""

IMPORT_ALL: Final = """
import sys
from importlib import import_module

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

absent, modules = (part.split(",") for part in sys.stdin.read().split())
sys.meta_path.insert(0, Absent())
for module in modules:
    import_module(module)
print(len(modules))
"""


def test_every_module_can_be_imported_without_what_is_for_development() -> None:
    needed = {_plain(name) for name in re.findall(r"^([A-Za-z0-9._-]+)(?:\[.*?\])?==", _text("requirements.txt"), re.MULTILINE)}
    absent = [
        package
        for package, owners in packages_distributions().items()
        if package not in ("proxy", "collectors", "dashboards") and not any(_plain(owner) in needed for owner in owners)
    ]
    assert {"pytest", "greenlet", "asyncpg", "psycopg"} <= set(absent)
    modules = [module for folder in ("proxy", "collectors") for module in _modules(ROOT / folder) if module not in NOT_IMPORTED]
    ran = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        input=f"{','.join(absent)} {','.join(modules)}",
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) == len(modules) > 100


def _modules(folder: Path) -> list[str]:
    names = (path.relative_to(ROOT).with_suffix("").parts for path in sorted(folder.rglob("*.py")))
    return [".".join(parts).removesuffix(".__init__") for parts in names if parts[-1] != "__main__"]


def _text(name: str) -> str:
    return (ROOT / name).read_text()


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
