"""The tools that are compared: what each runs on, and how a job is done by one in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.others.job import Answer, Job

ROOT = Path(__file__).parent.parent.parent
_WHOLE = ("W4A16", "W3A16", "W2A16G32", "MXFP4", "NVFP4")


class ToolFailed(Exception):
    """A tool that cannot be had or did not do its job; the message says why."""


@dataclass(frozen=True)
class Tool:
    """module: what runs. environment: in which it runs, a file of benchmarks/requirements; None is ours. schemes: what it does;
    None is every one."""

    module: str
    environment: str | None = None
    schemes: tuple[str, ...] | None = None


OURS = Tool("benchmarks.others.ours")
FORWARD = Tool("benchmarks.others.forward")
OTHERS = {
    "auto-round": Tool("benchmarks.others.auto_round_", "auto-round", (*_WHOLE, "W4A4")),
    "llm-compressor": Tool("benchmarks.others.llm_compressor", "llm-compressor", _WHOLE),
    "gptq": Tool("benchmarks.others.plain_gptq", "llm-compressor", _WHOLE),
}


def python_of(tool: Tool, environments: Path) -> str:
    """The interpreter that a tool runs on; its environment is made where it is not there. Raises ToolFailed."""
    if tool.environment is None:
        return sys.executable
    environment = environments / tool.environment
    python = environment / "bin" / "python"
    if not python.exists():
        print(f"making {environment}", file=sys.stderr)
        requirements = ROOT / "benchmarks" / "requirements" / f"{tool.environment}.txt"
        try:
            subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "--requirement", str(requirements)], check=True, stderr=subprocess.PIPE, text=True)
        except subprocess.CalledProcessError as error:
            shutil.rmtree(environment, ignore_errors=True)
            raise ToolFailed(f"cannot be installed here: {_last_line(error.stderr or '')}") from error
        except BaseException:
            shutil.rmtree(environment, ignore_errors=True)
            raise
    return str(python)


def done(tool: Tool, python: str, job: Job) -> Answer:
    """Have a job done; files lie beside `job.out`. Raises ToolFailed."""
    asked, told, log = (Path(f"{job.out}.{part}") for part in ("job", "answer", "log"))
    asked.write_text(json.dumps(asdict(job)), encoding="utf-8")
    with log.open("w", encoding="utf-8") as said:
        # The folder that -m starts from is the one that holds `benchmarks`.
        command = [python, "-m", tool.module, str(asked), str(told)]
        code = subprocess.run(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, check=False).returncode
    if code != 0 or not told.is_file():
        raise ToolFailed(f"ended with {code}: {_last_line(log.read_text(encoding='utf-8', errors='replace'))}")
    return Answer(**json.loads(told.read_text(encoding="utf-8")))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ERROR") or "Error: " in line] or lines
    return told[-1][:200] if told else "it said nothing"
