"""Read what bitlathe writes with the programs that it is written for, and compare: `make interop`.

One environment is made for each outside reader (interop/requirements has the pins). For every scheme the bundled model, or,
where rows must be longer, a random one, is quantized for every format that holds it. Each reader then opens its folders,
in a process of its own, and its weights and logits are compared with ours. The table is printed and goes into docs/interop.md,
and its rows into docs/interop.json, which the README's table is made from. The exit status is 1 if any reader sees anything
else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import bitlathe
from bitlathe.errors import BitlatheError, FormatError
from bitlathe.formats import FORMATS
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.numerics.scheme import PRESETS
from bitlathe.readers import READERS
from bitlathe.verifying import Job, judged, ours_for, read_by, readers_for

ROOT = Path(__file__).parent.parent
# Reader -> the environment it runs in; the others run in this one.
ENVIRONMENTS = {
    "gptqmodel": "gptqmodel",
    "auto-round": "auto-round",
    "gguf": "gguf",
    "transformers for GGUF": "gguf",
    "llama.cpp": "gguf",
    "mlx": "mlx",
}
# To nearest; the text is for static scales of activations.
_ROUNDED: dict[str, Any] = {"tuner": "rtn", "rtn": {"scale": "min-max"}, "calib": "builtin", "seqlen": 64, "samples": 2}


def main() -> int:
    """Parse, run, print, write; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m interop", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument(
        "--environments", type=Path, default=ROOT / ".interop", help="where the environments are made, and kept"
    )
    parser.add_argument("--formats", default=",".join(FORMATS), help="formats, by commas; others' rows stay as they are")
    asked = parser.parse_args()
    formats = asked.formats.split(",")
    with tempfile.TemporaryDirectory(prefix="bitlathe-interop-") as folder:
        made = list(_made(Path(folder), formats))
        rows = _read(made, Path(folder), asked.environments)
    _write(rows, formats)
    apart = [row for row in rows if not row["same"]]
    print(_table(rows))
    for row in apart:
        print(f"{row['format']} {row['scheme']} {row['reader']}: {row.get('error', 'other numbers')}", file=sys.stderr)
    return 1 if apart else 0


def _made(folder: Path, formats: list[str]) -> Iterator[tuple[str, str, Path, Path]]:
    """Every scheme in every format that holds it: (format, scheme, folder, folder of the native codes)."""
    wide = _wide(folder / "wide")
    for scheme in PRESETS:
        for format in formats:
            for model in ("builtin", str(wide)):
                out = folder / scheme / format
                both = tuple(dict.fromkeys(("native", format)))
                try:
                    bitlathe.quantize(model, out=out, scheme=scheme, formats=both, **_ROUNDED)
                except FormatError:
                    continue
                except BitlatheError as error:
                    if model == "builtin":  # whose rows are too short for it
                        continue
                    raise SystemExit(f"{scheme} in {format}: {error}") from error
                found = out / format if len(both) > 1 else out
                yield format, scheme, found, out / "native" if len(both) > 1 else out
                break


def _wide(folder: Path) -> Path:
    """A random model whose rows are multiples of 256, with the bundled model's tokenizer."""
    source = Checkpoint("builtin")
    config = LlamaConfig(
        **{key: source.config[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for path in source.companions():
        shutil.copy(path, folder)
    return folder


def _read(made: list[tuple[str, str, Path, Path]], scratch: Path, environments: Path) -> list[dict[str, Any]]:
    """What every reader sees of every folder."""
    asked: dict[str, list[int]] = {}
    for index, (format, _, folder, _) in enumerate(made):
        readers = readers_for(folder, format)
        for name in dict.fromkeys((*map(ours_for, readers), *readers)):
            asked.setdefault(name, []).append(index)
    rows: list[dict[str, Any]] = []
    for name, indices in asked.items():
        jobs = [Job(str(made[i][2]), str(made[i][3]), str(_logits(scratch, name, i))) for i in indices]
        print(f"{name}: {len(jobs)} folders", file=sys.stderr)
        for index, row in zip(indices, read_by(name, jobs, _python(name, environments)), strict=True):
            if name not in READERS:  # ours, as another one computes
                continue
            row = judged(row, ours=_logits(scratch, ours_for(name), index), theirs=_logits(scratch, name, index))
            rows.append({"format": made[index][0], "scheme": made[index][1], **row})
    return rows


def _logits(scratch: Path, name: str, index: int) -> Path:
    return scratch / f"{name.replace(' ', '-')}-{index}.safetensors"


def _python(name: str, environments: Path) -> str:
    """The interpreter that has a reader; its environment is made where it is not there."""
    if name not in ENVIRONMENTS:
        return sys.executable
    environment = environments / ENVIRONMENTS[name]
    python, complete = environment / "bin" / "python", environment / "complete"
    if not complete.exists():
        print(f"making {environment}", file=sys.stderr)
        requirements = Path(__file__).parent / "requirements" / f"{environment.name}.txt"
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--requirement", str(requirements)], check=True)
        subprocess.run([*pip, "--editable", str(ROOT)], check=True)
        complete.touch()
    return str(python)


def _write(rows: list[dict[str, Any]], formats: list[str]) -> None:
    """Bring docs/interop.json and docs/interop.md to what was found."""
    data = ROOT / "docs" / "interop.json"
    earlier = json.loads(data.read_bytes())["rows"] if data.is_file() else []
    kept = [row for row in earlier if row["format"] not in formats]
    every = [{key: value for key, value in row.items() if key != "error"} for row in (*kept, *rows)]
    every.sort(key=lambda row: (list(FORMATS).index(row["format"]), list(READERS).index(row["reader"])))
    data.write_text(json.dumps({"date": str(date.today()), "rows": every}, indent=1) + "\n", encoding="utf-8")
    words = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8").partition("<!-- table -->\n")[0]
    versions = f"{date.today()}, bitlathe {bitlathe.__version__}, torch {torch.__version__.partition('+')[0]}, CPU\n\n"
    (ROOT / "docs" / "interop.md").write_text(f"{words}<!-- table -->\n{versions}{_table(every)}", encoding="utf-8")


def _table(rows: list[dict[str, Any]]) -> str:
    """All rows, in Markdown."""
    lines = ["| format | scheme | read by | linears | weights that differ | by at most (roundings) | KL of logits | |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        kl = "-" if row["kl"] is None else f"{row['kl']:.1e}"
        apart = [str(row.get("linears", "-")), str(row.get("unequal", "-")), f"{row.get('largest', float('nan')):.2g}"]
        verdict = "same" if row["same"] else "DIFFERENT"
        cells = [row["format"], row["scheme"], f"{row['reader']} {row['version']}", *apart, kl, verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
