"""The house rules hold for every module of the package, and each of them can fail."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest

import rules

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "bitlathe"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: rules.Rule) -> None:
    found = [
        f"src/bitlathe/{name}:{line}: {words}"
        for name in MODULES
        for line, words in rule(PurePosixPath(name), ast.parse((PACKAGE / name).read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)


BROKEN = [
    (rules.rounding, "formats/a.py", "y = (x / s).round()"),
    (rules.rounding, "tune/a.py", "y = torch.clamp(x, -8, 7)"),
    (rules.rounding, "model/a.py", "y = x.to(torch.float8_e4m3fn)"),
    (rules.rounding, "formats/a.py", "y = x.to(dtype=torch.int8)"),
    (rules.walking, "evaluation/a.py", "for layer in model.model.layers:\n    x = layer(x)"),
    (rules.walking, "tune/a.py", "outs = [f(i, b) for i, b in enumerate(model.get_submodule(arch.blocks))]"),
    (rules.walking, "pipeline.py", "for i in range(skeleton.depth):\n    b = skeleton.block(i, w, c, d)"),
    (rules.importing, "numerics/a.py", "from bitlathe.plan import Plan"),
    (rules.importing, "formats/a.py", "from bitlathe.model.block import Block"),
    (rules.importing, "tune/a.py", "import bitlathe.evaluation.perplexity"),
    (rules.importing, "io/a.py", "from bitlathe.arch import ARCHS"),
    (rules.importing, "io/a.py", "from bitlathe import __version__"),
    (rules.importing, "model/a.py", "from bitlathe import report"),
    (rules.importing, "attic/a.py", "import torch"),
    (rules.importing, "io/a.py", "from .sizes import human"),
    (rules.importing, "cli.py", "def f():\n    import torch"),
    (rules.probing, "io/a.py", "if hasattr(x, 'y'): pass"),
    (rules.probing, "io/a.py", "getattr(x, 'y', None)"),
    (rules.probing, "model/a.py", "layer.forward = other"),
    (rules.probing, "model/a.py", "setattr(layer, 'forward', other)"),
    (rules.state, "io/a.py", "def f():\n    global x\n    x = 1"),
    (rules.state, "io/a.py", "_seen = {}"),
    (rules.state, "io/a.py", "_seen: set[str] = set()"),
    (rules.state, "io/a.py", "@cache\ndef f(): return 1"),
    (rules.state, "formats/a.py", "FORMATS['x'] = y"),
    (rules.state, "formats/a.py", "FORMATS.update(x=y)"),
    (rules.environment, "io/a.py", "x = os.environ.get('X')"),
    (rules.environment, "io/a.py", "from os import getenv"),
    (rules.catching, "io/a.py", "try: f()\nexcept Exception: pass"),
    (rules.catching, "io/a.py", "try: f()\nexcept (ValueError, BaseException): pass"),
    (rules.catching, "io/a.py", "try: f()\nexcept: pass"),
    (rules.exiting, "pipeline.py", "sys.exit(1)"),
    (rules.exiting, "io/a.py", "raise SystemExit(1)"),
]
KEPT = [
    (rules.rounding, "numerics/a.py", "y = (x / s).round().to(torch.int8)"),
    (rules.rounding, "formats/a.py", "y = math.ceil(x) + round(3.4); z = q.view(torch.uint8); w = x.to(torch.float32)"),
    (rules.walking, "model/walk.py", "for i in range(skeleton.depth):\n    b = skeleton.block(i, w, c, d)"),
    (rules.walking, "pipeline.py", "for step in walk(skeleton, weights): x = [n for n in tuned.layers.items()]"),
    (rules.importing, "model/a.py", "from bitlathe.formats.base import QuantLayer\nfrom bitlathe.model.block import Block"),
    (rules.importing, "numerics/a.py", "import torch\nfrom bitlathe.errors import RecipeError"),
    (rules.state, "io/a.py", "TABLE: dict[str, int] = {}\n__all__ = ['x']\n_SIZES = [1]"),
    (rules.probing, "io/a.py", "getattr(x, 'y')"),
    (rules.catching, "io/a.py", "try: f()\nexcept BaseException:\n    tidy()\n    raise"),
    (rules.exiting, "cli.py", "sys.exit(1)"),
]


@pytest.mark.parametrize(("rule", "path", "source"), BROKEN)
def test_the_rule_can_fail(rule: rules.Rule, path: str, source: str) -> None:
    assert list(rule(PurePosixPath(path), ast.parse(source)))


@pytest.mark.parametrize(("rule", "path", "source"), KEPT)
def test_the_rule_lets_pass_what_it_should(rule: rules.Rule, path: str, source: str) -> None:
    assert not list(rule(PurePosixPath(path), ast.parse(source)))


# Written so that the patterns do not match themselves.
_PLACES = "work|root|tmp|home|opt|Users|mnt"
_HOSTS = r"p[y]pi\.org|python[h]osted|npm[j]s\.|download\.[p]ytorch|inde[x]-url|fin[d]-links"
MACHINE = re.compile(rf"(?<![\w.~)}}*])/(?:{_PLACES})/|{_HOSTS}")


def repository_files() -> list[Path]:
    """Every file that belongs to the project."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_file_names_a_machine_s_paths_or_a_registry_s_host() -> None:
    found = []
    for path in repository_files():
        if path.suffix != ".safetensors":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if MACHINE.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("line", ["p = '|work|x'", "cd |root|y", "|tmp|z", "https:||p_ypi.org|simple", "--inde_x-url x"])
def test_such_a_line_would_be_found(line: str) -> None:
    assert MACHINE.search(line.replace("|", "/").replace("_", ""))


def test_what_ships_is_small() -> None:
    assert sum(path.stat().st_size for path in (PACKAGE / "data").rglob("*") if path.is_file()) < 4 * 10**6
