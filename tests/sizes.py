"""What has grown long: files over 400 lines, functions over 60. A report for reviewers, not a test."""

from __future__ import annotations

import ast
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_FILE_LINES, _FUNCTION_LINES = 400, 60


def main() -> None:
    """Print one line for everything that is over, and a closing count."""
    over = 0
    for path in sorted(path for folder in ("src", "tests", "benchmarks") for path in (_ROOT / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = len(source.splitlines())
        name = path.relative_to(_ROOT)
        if lines > _FILE_LINES:
            over += 1
            print(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > _FUNCTION_LINES:
                    over += 1
                    print(f"{name}:{node.lineno}: {node.name} has {length} lines")
    print(f"{over} over (files: {_FILE_LINES} lines, functions: {_FUNCTION_LINES})")


if __name__ == "__main__":
    main()
