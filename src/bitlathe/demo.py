"""`bitlathe demo`: the whole way on the bundled model, with the result reloaded by a new process.

`python -m bitlathe.demo FOLDER` is that process's other half: it prints, as JSON, how a quantized model goes on with a text.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitlathe.errors import BitlatheError
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.load import load
from bitlathe.pipeline import quantize
from bitlathe.report import Listener, inspect

SCHEME = "W4A16"
_MODEL = "builtin"
_PROMPT = "It was a dark night, and the old man"
_NEW_TOKENS = 40
# Short windows and few steps: the demo is to take seconds a block on two cores, and four bits gain little from more.
_SEQLEN, _SAMPLES = 256, 64


def demo(out: Path | None, *, listen: Listener) -> dict[str, Any]:
    """Quantize the bundled model, reload it in a new process and compare.

    out: where to keep the result; None for a temporary folder. Returns {"scheme", "original": {"bytes", "text"}, "quantized":
    likewise, "evaluation": what `bitlathe.evaluate` found, "verified": what
    `bitlathe.verify` did}. Raises a BitlatheError if any of it fails.
    """
    if out is not None:
        return _run(out, listen)
    with tempfile.TemporaryDirectory(prefix="bitlathe-demo-") as folder:
        return _run(Path(folder) / SCHEME, listen)


def _run(out: Path, listen: Listener) -> dict[str, Any]:
    quantize(_MODEL, out=out, scheme=SCHEME, calib="builtin", seqlen=_SEQLEN, samples=_SAMPLES, listen=listen)
    evaluation = _in_new_process("bitlathe", "eval", str(out), "--against", _MODEL, "--seqlen", str(_SEQLEN), "--json")
    verified = _in_new_process("bitlathe", "verify", str(out), "--json")
    quantized = _in_new_process("bitlathe.demo", str(out))
    original = AutoModelForCausalLM.from_pretrained(Checkpoint(_MODEL).path, dtype="auto")
    return {
        "scheme": SCHEME,
        "original": {"bytes": inspect(_MODEL)["bytes"], "text": _continued(original, Checkpoint(_MODEL).path)},
        "quantized": {"bytes": inspect(out)["bytes"], "text": quantized["text"]},
        "evaluation": evaluation,
        "verified": verified,
    }


def _in_new_process(module: str, *arguments: str) -> dict[str, Any]:
    """The JSON that `python -m module arguments` prints."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BitlatheError(
            f"python -m {module} {' '.join(arguments)} failed with exit status {done.returncode}; what it said is above"
        )
    return json.loads(done.stdout)


@torch.no_grad()
def _continued(model: Any, folder: Path) -> str:
    """The prompt and how the model goes on, each token the likeliest that repeats no three tokens, in one line."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(_PROMPT, return_tensors="pt", add_special_tokens=False)
    written = model.generate(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        no_repeat_ngram_size=3,
    )
    return " ".join(tokenizer.decode(written[0], skip_special_tokens=True).split())


def main(arguments: Sequence[str]) -> None:
    """Print {"text": ...} for the quantized model in the folder that is the only argument."""
    (folder,) = arguments
    print(json.dumps({"text": _continued(load(folder), Path(folder))}))


if __name__ == "__main__":
    main(sys.argv[1:])
