"""What quantizing a large model takes, told by a few blocks of its shape with random weights:

    python -m benchmarks.scale llama-3.1-8b --blocks 3 --samples 128 --seqlen 2048

Every block costs the same, so seconds of the model are those of the run and, for each block that is not there, those of a block
more; memory grows by what it grew from the second block to the last. "pass": one float forward pass of the calibration tokens
through a block; "floor": all bare passes that the tuner needs, forwards for each of its streams, and backwards where it
descends. Random weights: this shows time and memory, and nothing of accuracy.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from benchmarks.others.job import Job
from benchmarks.others.tools import OURS, Tool, ToolFailed, done
from benchmarks.versus import tool_named
from bitlathe.errors import BitlatheError
from bitlathe.io.checkpoint import find_folder
from bitlathe.io.sizes import human
from bitlathe.model.calib import characters_for, text_of, tokenizer_of, windows_of
from bitlathe.model.source import device_named
from bitlathe.recipe import parse_sets

# The config.json of the models of these names, without what time and memory do not depend on.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen3-32b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
BARE = Tool("benchmarks.others.bare")
_BLOCK = re.compile(r"model\.layers\.(\d+)\.")
HEADER = (
    "| shape | tuner | pass, s a block | floor, s a block | s a block | passes | s the model | floor, the model | peak memory "
    "| above imports | of the model | GPU memory |"
)


def generate(folder: Path, shape: Mapping[str, Any], blocks: int) -> None:
    """Write a model of `blocks` blocks with random weights in bfloat16, one file a block, each alone in memory."""
    longest = {"max_position_embeddings": 8192, "tie_word_embeddings": False, "dtype": "bfloat16"}
    kind, rest = shape["model_type"], {key: value for key, value in shape.items() if key != "model_type"}
    config: PretrainedConfig = AutoConfig.for_model(kind, **{**longest, **rest, "num_hidden_layers": blocks})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    parts: dict[str, dict[str, torch.Size]] = defaultdict(dict)
    for name, tensor in model.state_dict().items():
        found = _BLOCK.match(name)
        parts[f"block-{found[1]}" if found else name][name] = tensor.shape
    generator, places = torch.Generator().manual_seed(0), {}
    for part, shapes in parts.items():
        file = f"model-{part}.safetensors"
        save_file({name: _random(size, generator) for name, size in shapes.items()}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copyfile(find_folder("builtin") / name, folder / name)


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A gain of ones, or a matrix whose outputs are as large as its inputs."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[-1] ** -0.5, generator=generator)


def row(name: str, tuner: str, depth: int, found: Mapping[str, Any]) -> str:
    """A line of the table. depth: blocks of the whole model. found: see `measure`."""
    ours, bare, blocks = found["answer"], found["bare"], found["blocks"][:-1]
    each = (blocks[-1]["elapsed"] - blocks[0]["elapsed"]) / (len(blocks) - 1)
    left = depth - len(blocks)
    grown = blocks[-1]["peak_ram"] - blocks[1]["peak_ram"]
    more = left * grown / (len(blocks) - 2) if len(blocks) > 2 else 0
    passes = f"{each / bare['pass']:.1f}" if bare else ""
    floor = [f"{bare['pass']:.2f}", f"{bare['floor']:.2f}"] if bare else ["", ""]
    whole = f"{depth * bare['floor']:.0f}" if bare else ""
    memory = [human(size) for size in (ours.peak, ours.peak - ours.imports, int(ours.peak + more))]
    gpu = human(ours.vram) if ours.vram else ""
    cells = [name, tuner, *floor, f"{each:.2f}", passes, f"{ours.seconds + left * each:.0f}", whole, *memory, gpu]
    return f"| {' | '.join(cells)} |"


def measure(folder: Path, job: Job) -> dict[str, Any]:
    """{"answer": of the run, "blocks": its reports, the head's last, "bare": see benchmarks.others.bare, None for a tuner that
    reads no text}. Raises ToolFailed."""
    answer = done(OURS, sys.executable, job)
    blocks = json.loads((Path(job.out) / "report.json").read_text(encoding="utf-8"))["blocks"]
    beside = Job(**{**vars(job), "out": f"{job.out}-bare"})
    done(BARE, sys.executable, beside)
    bare = json.loads(Path(beside.out).read_text(encoding="utf-8"))
    return {"answer": answer, "blocks": blocks, "bare": bare}


def table(given: argparse.Namespace) -> Iterator[str]:
    """One row for every tuner, each as soon as it is there."""
    yield HEADER
    yield "|" + "---|" * (HEADER.count("|") - 1)
    shape = {**SHAPES[given.shape], **({"vocab_size": given.vocab} if given.vocab else {})}
    with tempfile.TemporaryDirectory(prefix="bitlathe-scale-", dir=given.work) as work:
        folder = Path(work) / "model"
        folder.mkdir()
        generate(folder, shape, given.blocks)
        documents = text_of(given.calib, "calibration", characters=characters_for(given.samples, given.seqlen))
        windows = windows_of(tokenizer_of(folder), documents, seqlen=given.seqlen, count=given.samples, seed=0)
        save_file({"calibration": windows}, f"{work}/tokens")
        for index, tuner in enumerate(given.tuners):
            job = Job(
                model=str(folder),
                out=f"{work}/out-{index}",
                scheme=given.scheme,
                tokens=f"{work}/tokens",
                calib=given.calib,
                seed=0,
                steps=given.steps,
                batch=given.batch,
                device=given.device,
                fields={**tool_named(tuner)[1], **given.fields},
            )
            try:
                yield row(given.shape, tuner, shape["num_hidden_layers"], measure(folder, job))
            except ToolFailed as error:
                yield f"| {given.shape} | {tuner} | {str(error).replace('|', '/')} |"


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("shape", choices=SHAPES, help="whose shape")
    parser.add_argument("--blocks", type=int, default=3, help="how many are quantized, at least 2 (default: 3)")
    parser.add_argument("--vocab", type=int, help="a smaller vocabulary, to leave the embeddings out of it")
    parser.add_argument("--scheme", default="W4A16", help="default: W4A16")
    parser.add_argument("--tuners", default="closed-form", help="as tuner or tuner:effort, with commas")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="FIELD=VALUE", help="more of the recipe")
    parser.add_argument("--calib", default="builtin", help="calibration text (default: the bundled one)")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows (default: 128)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a window (default: 512)")
    parser.add_argument("--steps", type=int, default=200, help="of tuners that take steps (default: 200)")
    parser.add_argument("--batch", type=int, default=8, help="sequences at a time (default: 8)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--work", type=Path, help="a folder with room for the blocks and their codes")
    given = parser.parse_args(arguments)
    given.tuners = given.tuners.split(",")
    if given.blocks < 2:
        parser.error("the cost of a block is told by the difference of two: give --blocks 2 or more")
    try:
        given.fields, given.device = parse_sets(given.sets), device_named(given.device).type
        strange = [name for name in given.tuners if tool_named(name)[0] is not OURS]
        if strange:
            raise ValueError(f"{strange[0]} is another program's; give tuners of ours")
    except (ValueError, BitlatheError) as error:
        parser.error(str(error))
    given.calib = str(Path(given.calib).resolve()) if Path(given.calib).is_file() else given.calib
    return given


def main() -> None:
    """Print the table."""
    given = parsed()
    place = torch.cuda.get_device_name() if given.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{given.scheme}, {given.blocks} blocks, {given.samples} windows of {given.seqlen} tokens, {place}\n")
    for line in table(given):
        print(line, flush=True)


if __name__ == "__main__":
    main()
