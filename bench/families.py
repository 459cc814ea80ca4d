"""Which decoder families of the installed transformers import, and whether their tokens are transformers' own.

    python bench/families.py --work DIR [--only NAME ...] [--multimodal] [--seconds N]    try families; results go to DIR/results.jsonl
    python bench/families.py --work DIR --table    put them, and the gguf.jsonl of bench/gguf_families.py, into docs/models.md

Each family is a tiny model with random weights (bench/tiny_decoders.py): made and saved by transformers, imported by `mesh import`'s own
function, then run as stages of 1 to N shards. 24 greedy tokens are compared with those that transformers generates. Where layers carry
states, they are compared after a prompt that goes past a checkpoint of them too, and so is what a replay from that checkpoint gives. A run
goes on where the last one ended. Needs the extras `import` and `trace`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiny_decoders

from mesh.errors import MeshError
from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model
from mesh.importer.sources.safetensors import has_family
from mesh.importer.trace.library import quiet, torch_and_transformers, versions
from mesh.importer.trace.model import open_model
from mesh.importer.trace.refused import refuse_config_file
from mesh.model.manifest import Manifest
from mesh.runtime.programs import Compiled
from mesh.runtime.row_states import EVERY
from mesh.runtime.sampling import SamplingParams
from mesh.runtime.stage import Stage, StageConfig
from mesh.types import LayerRange

PROMPT = 20
LONG_PROMPT = EVERY + 24
TOKENS = 24
LONGEST_S = 600
DIFFERS = "; transformers' `generate` differs there from its own logits without a cache, which ours equal"
WITH_IMAGES = ", with images"
"""After a family's name: the model of images and text, whose text decoder is imported."""
GREEDY = SamplingParams(temperature=0.0)
DOCS = Path(__file__).parents[1] / "docs" / "models.md"
HEAD = """\
# Models that import

`mesh import` takes an exported ONNX decoder, a GGUF file, or a Hugging Face directory. A directory of these families is built from its
weights: bloom, gemma3, gpt2, gpt_neox, llama, mistral, mixtral, opt, phi3, qwen2, qwen3. Any other family is traced: transformers' own
implementation becomes one graph, and the graph goes the way of an ONNX export ([how](model-format.md#traced-models)). Tracing needs
`pip install 'stagemesh[trace]'`.

The table is written by `bench/families.py`, which tries every model_type that transformers {transformers} (with torch {torch}) lists as a
causal language model, or as a model of images and text with one inside: tiny models with random weights, 24 greedy tokens compared with
those that transformers generates, at every number of shards; where layers carry states, also after a prompt that goes past a checkpoint of
them, and after a replay from there. Of the {all} families that have been tried so far {equal} import with equal tokens and {refused} are
refused, where `config.json` tells it before torch and transformers are loaded (the slowest in {slowest} s where they were); for {others}
the tiny model cannot be made, or the attempt ended otherwise. A family that is not in the table has not been tried: `mesh import` says
what it finds, and writes no model whose logits differ from transformers' in its own check.
"""
GGUF_HEAD = """
## GGUF files

Files of the architectures llama, qwen2, qwen3 and gemma3 are built from their weights. Any other is traced like a Hugging Face directory:
the `gguf` package's tables name the tensors, the metadata become a configuration of transformers, and a key or a tensor that nothing reads
refuses the file ([how](model-format.md#traced-models)).

The table is written by `bench/gguf_families.py`: llama.cpp's own converter makes files of tiny models with random weights, and 24 greedy
tokens of the imported file are compared with those of the model that was converted, at every number of shards; where layers carry states,
also after a prompt that goes past a checkpoint of them (in rows since that was added). Of models of images and text the files hold the
text decoder. The last column says the same of llama.cpp's tokens from the file. Of the {all} families tried {equal} import with equal
tokens and {refused} are refused; {others} cannot be converted, or the attempt ended otherwise.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--again", action="store_true", help="also those that are in the results already")
    parser.add_argument("--multimodal", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no family later than this")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / "results.jsonl"
    if options.table:
        before = DOCS.read_text(encoding="utf-8")
        DOCS.write_text(page(read(results), before) + gguf_page(read(options.work / "gguf.jsonl"), before), encoding="utf-8")
        return
    began, done = time.monotonic(), set() if options.again else set(read(results))
    for kind in options.only or tiny_decoders.families(options.multimodal):
        family = f"{kind}{WITH_IMAGES}" if options.multimodal else kind
        if family in done or time.monotonic() - began > options.seconds:
            continue
        result = tried(kind, options.work, options.multimodal)
        with results.open("a") as file:
            file.write(json.dumps({"family": family, **result}) + "\n")
        print(f"{family}: {json.dumps(result)}", flush=True)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last result of each family."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(entry := json.loads(line))["family"]: entry for line in lines}


def tried(kind: str, work: Path, multimodal: bool = False) -> dict[str, Any]:
    """How one family went: `outcome` is equal, different, refused, failed or unmade (no tiny model could be made)."""
    source, out = work / "source", work / "model"
    for each in (source, out):
        shutil.rmtree(each, ignore_errors=True)
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(LONGEST_S)
    try:
        with quiet():
            made = tiny_decoders.make(kind, source, multimodal=multimodal)
    except Exception as error:  # each family has its own demands on its sizes
        signal.alarm(0)
        return refused_by_name(kind, source) or {"outcome": "unmade", "why": one_line(error)}
    try:
        with quiet():
            expected = wanted(made)
    except Exception as error:  # nor can all of them be called with token ids alone
        expected, silent = [], one_line(error)
    began, cpu = time.monotonic(), time.process_time()
    try:
        way = "builder" if has_family(source) else "trace"
        manifest = import_model(source, out, ImportOptions())
        took = {"way": way, "seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        took |= {"late": manifest.report.get("late_positions"), "windows": sorted({c.window for c in manifest.cache if c.window})}
        if not expected:
            return {"outcome": "unmade", "why": f"it imports, but transformers generates nothing to compare with: {silent}", **took}
        counts = list(range(1, manifest.layers + 1))
        compiled: Compiled = {}
        found = {count: greedy(out, manifest, expected[:PROMPT], count, compiled) for count in counts}
        if all(tokens == found[1] for tokens in found.values()) and found[1] != expected and found[1] == uncached(made, expected[:PROMPT]):
            expected, took = found[1], took | {"note": DIFFERS}
        wrong = [count for count, tokens in found.items() if tokens != expected]
        if manifest.has_states and not wrong:
            wrong = wrong_past_a_checkpoint(made, out, manifest, compiled)
        return {"outcome": "different" if wrong else "equal", "shards": counts, "wrong": wrong, **took}
    except MeshError as error:
        took = {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        return {"outcome": "refused", "kind": type(error).__name__, "why": one_line(error), **took}
    except Exception as error:
        return {"outcome": "failed", "why": f"{type(error).__name__}: {one_line(error)}", "seconds": round(time.monotonic() - began, 1)}
    finally:
        signal.alarm(0)


def refused_by_name(kind: str, directory: Path) -> dict[str, Any] | None:
    """How a family whose model cannot be made is refused for its configuration alone, or, where that cannot be made either, for its name;
    None where it is not."""
    began = time.monotonic()
    try:
        refuse_config_file(directory / "config.json", {"model_type": kind})
        tiny_decoders.configuration(kind).save_pretrained(directory)
        began = time.monotonic()
        open_model(directory)
    except MeshError as error:
        return {"outcome": "refused", "kind": type(error).__name__, "why": one_line(error), "seconds": round(time.monotonic() - began, 1)}
    except Exception:
        return None
    return None


def wanted(model: Any) -> list[int]:
    """A random prompt and the tokens that transformers adds to it."""
    torch, _ = torch_and_transformers()
    prompt = np.random.default_rng(3).integers(5, 96, PROMPT)
    ids = torch.from_numpy(prompt)[None]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, eos_token_id=None, forced_eos_token_id=None
    )
    return [int(token) for token in out[0]]


def uncached(model: Any, prompt: Sequence[int]) -> list[int]:
    """A prompt and the likeliest tokens that transformers gives for the whole sequence, without a cache."""
    torch, _ = torch_and_transformers()
    tokens = list(prompt)
    with torch.no_grad(), quiet():
        for _ in range(TOKENS):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens


def greedy(
    directory: Path, manifest: Manifest, prompt: Sequence[int], shards: int, compiled: Compiled, *, replay: bool = False
) -> list[int]:
    """The same by stages of our runtime, one for each of `shards` layer ranges. `replay`: the last token is that of a replay from the first
    checkpoint of states."""
    bounds = np.linspace(0, manifest.layers, shards + 1).astype(int)
    stages = [
        Stage.load(
            directory,
            StageConfig(LayerRange(int(a), int(b)), head=b == manifest.layers, rows=1, context=len(prompt) + TOKENS + 4, chunk=32),
            compiled=compiled,
        )
        for a, b in pairwise(bounds)
    ]
    stages[-1].open(0, GREEDY, prompt_length=len(prompt))
    tokens = list(prompt)
    result: Any = None
    for stage in stages:
        result = stage.prefill(0, 0, np.array(tokens), result)
    for _ in range(TOKENS - 1):
        tokens.append(int(result.id))
        hidden: Any = None
        for stage in stages:
            hidden = stage.decode(np.array([0]), np.array([len(tokens) - 1]), np.array(tokens[-1:]), hidden)
        (result,) = hidden
    if replay:
        result = None
        for stage in stages:
            result = stage.prefill(0, EVERY, np.array(tokens[EVERY:]), result)
    return [*tokens, int(result.id)]


def wrong_past_a_checkpoint(model: Any, directory: Path, manifest: Manifest, compiled: Compiled) -> list[int]:
    """Of one shard and one for each layer, the counts with which the tokens after a long prompt differ from those of `uncached`."""
    prompt = [int(token) for token in np.random.default_rng(4).integers(5, 96, LONG_PROMPT)]
    expected = uncached(model, prompt)
    return [
        count for count in sorted({1, manifest.layers}) if greedy(directory, manifest, prompt, count, compiled, replay=True) != expected
    ]


def _late(*_: Any) -> None:
    raise TimeoutError(f"more than {LONGEST_S} s")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def page(results: dict[str, dict[str, Any]], before: str) -> str:
    """docs/models.md without its part about GGUF files: the rows that it had `before`, and the results of those that were tried since."""
    rows = _rows(before, "family") | {(family,): [family, _way(each), _outcome(each)] for family, each in results.items()}
    counts = _counts([row[2] for row in rows.values()])
    head = HEAD.format(**versions(), **counts, slowest=max((_refused_after(row[2]) for row in rows.values()), default=0.0))
    return "\n".join([head, "| family | way | tokens |", "|---|---|---|", *_lines(rows), ""])


def gguf_page(results: dict[str, dict[str, Any]], before: str) -> str:
    """The part about GGUF files, in the same way."""
    new = [[each.get("architecture", "-"), each["family"], _way(each), _outcome(each), each.get("llama", "-")] for each in results.values()]
    rows = _rows(before, "architecture") | {(row[0], row[1]): row for row in new}
    head = GGUF_HEAD.format(**_counts([row[3] for row in rows.values()]))
    return "\n".join([head, "| architecture | of the family | way | tokens | llama.cpp |", "|---|---|---|---|---|", *_lines(rows), ""])


def _rows(text: str, first: str) -> dict[tuple[str, ...], list[str]]:
    """The rows of the table whose first column is named so, by the family, or the architecture and the family."""
    _, _, table = text.partition(f"| {first} |")
    lines = itertools.takewhile(lambda line: line.startswith("|"), table.splitlines()[1:])
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {tuple(row[: 1 if first == "family" else 2]): row for row in rows[1:]}


def _lines(rows: dict[tuple[str, ...], list[str]]) -> list[str]:
    return [f"| {' | '.join(rows[key])} |" for key in sorted(rows)]


def _counts(outcomes: Sequence[str]) -> dict[str, int]:
    kinds = Counter(outcome.split(" ")[0].rstrip(":") for outcome in outcomes)
    others = len(outcomes) - kinds["equal"] - kinds["refused"]
    return {"all": len(outcomes), "equal": kinds["equal"], "refused": kinds["refused"], "others": others}


def _refused_after(outcome: str) -> float:
    """The seconds that `outcome` says a refusal took; 0 where it says none."""
    said = re.match(r"refused after ([\d.]+) s", outcome)
    return float(said[1]) if said else 0.0


def _way(result: dict[str, Any]) -> str:
    return result.get("way", "-")


def _outcome(result: dict[str, Any]) -> str:
    if result["outcome"] == "equal":
        return f"equal at 1 to {len(result['shards'])} shards{result.get('note', '')}"
    why = re.sub(r"^\S*(source(/config\.json)?|\.gguf): ", "", result.get("why", "")).replace("|", "\\|")
    after = f" after {result['seconds']} s" if result["outcome"] == "refused" and "seconds" in result else ""
    return f"{result['outcome']}{after}: {why[:220]}"


if __name__ == "__main__":
    main()
