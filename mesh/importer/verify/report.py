"""What storing weights, or keys and values, in fewer bits costs: perplexity of a fixed text, and the logits' relative error."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.importer.options import ImportOptions
from mesh.importer.sources.source import Source
from mesh.importer.verify.verify import runtime_logits
from mesh.importer.write.blocks import BlockWriter
from mesh.model.manifest import HiddenInfo, Manifest
from mesh.model.tokenizer import Tokenizer
from mesh.types import Progress

__all__ = ["REPORT_TEXT", "measure_against_float32", "measure_cache"]

TOKENS = 384

REPORT_TEXT = """\
A river that leaves the mountains carries more than water. In spring, when the snow gives way, it takes gravel from the banks and \
drops it again where the valley widens, so that the bed of the stream is never the same two years in a row. The people who farmed \
the valley knew this, and built their houses well above the highest mark of the flood. They kept a record of it on the wall of the \
mill: a line for each bad year, with the date beside it and sometimes a name.

When the railway came, the engineers asked to see that wall. They copied the marks into a book, worked out how much water must \
have passed through the narrow place below the bridge, and made the arches of their own bridge a third higher than they had \
planned. It cost them a season and a good deal of money, and for forty years it seemed that both had been wasted. Then, in one \
night, the river rose further than anyone alive had seen. In the morning the old bridge was gone, and the new one stood with the \
water a hand below its crown.

The lesson that is usually drawn from this story is that one should listen to those who know a place. There is another, which \
engineers are slower to repeat: a measurement that nobody needs today is worth keeping, because the day on which it is needed is \
not announced. The miller had no theory of floods. He had a wall, a knife and the habit of marking what he saw. What made his marks \
useful was that they were honest, that they were dated, and that they were in a place where the next person would find them.

Computers have made it cheap to keep such records and easy to lose them. A program can note ten thousand facts each second about \
its own work, and most of these notes will be deleted before anyone reads them. The difficult part is to decide which of them are \
the marks on the wall: the few numbers which tell, years later, how high the water came.
"""


def measure_against_float32(
    source: Source, directory: Path, manifest: Manifest, options: ImportOptions, progress: Progress
) -> dict[str, Any]:
    """Figures for the manifest's report: perplexity of this model and of the same source at 32 bits, and how far apart they are.

    A model without a tokenizer is measured on random tokens: their perplexity says little, the error as much.
    """
    tokens = _tokens(directory, manifest)
    mine = _Score(tokens)
    if options.bits == 32 and options.dtype == "float32" and manifest.weights.kept is None:
        for logits in runtime_logits(directory, manifest, tokens):
            mine.add(logits)
        return {"perplexity": mine.perplexity, "perplexity_float32": mine.perplexity, "logits_error_float32": 0.0, "tokens": len(tokens)}
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.float32-", dir=directory.parent) as scratch:
        exact = _float32(source, Path(scratch), manifest, progress)
        pair = _Pair(tokens, runtime_logits(directory, manifest, tokens), runtime_logits(Path(scratch), exact, tokens))
    return {
        "perplexity": pair.ours.perplexity,
        "perplexity_float32": pair.expected.perplexity,
        "logits_error_float32": pair.error,
        "tokens": len(tokens),
    }


def measure_cache(directory: Path, manifest: Manifest, narrow: Manifest) -> dict[str, Any]:
    """The same for a cache of another type: `narrow` is `manifest` with it. `kv_cache_greedy_equal`: of likeliest tokens."""
    tokens = _tokens(directory, manifest)
    pair = _Pair(tokens, runtime_logits(directory, narrow, tokens), runtime_logits(directory, manifest, tokens))
    return {
        "kv_cache_perplexity": pair.ours.perplexity,
        "kv_cache_perplexity_exact": pair.expected.perplexity,
        "kv_cache_logits_error": pair.error,
        "kv_cache_greedy_equal": pair.equal,
        "kv_cache_tokens": len(tokens),
    }


class _Pair:
    """Two models' logits of the same tokens: their perplexities, the relative error of one, and the share of equal likeliest tokens."""

    def __init__(self, tokens: npt.NDArray[np.int64], ours: Iterator[Any], expected: Iterator[Any]) -> None:
        self.ours, self.expected = _Score(tokens), _Score(tokens)
        different = total = 0.0
        equal = 0
        for mine, theirs in zip(ours, expected, strict=True):
            self.ours.add(mine)
            self.expected.add(theirs)
            different += float(np.square(mine - theirs, dtype=np.float64).sum())
            total += float(np.square(theirs, dtype=np.float64).sum())
            equal += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
        self.error = float(np.sqrt(different / max(total, 1e-30)))
        self.equal = equal / len(tokens)


def _float32(source: Source, scratch: Path, manifest: Manifest, progress: Progress) -> Manifest:
    options = ImportOptions(bits=32)
    blocks = source.write_blocks(BlockWriter(scratch), options, progress)
    update = {"hidden": HiddenInfo(size=manifest.hidden.size, dtype="float32"), "cache_dtype": "float32", "blocks": blocks}
    exact = manifest.model_copy(update={**update, "weights": options.weights, "tokenizer": None, "extra_files": ()})
    exact.save(scratch)
    return exact


def _tokens(directory: Path, manifest: Manifest) -> npt.NDArray[np.int64]:
    count = min(TOKENS, manifest.context_length)
    if manifest.tokenizer is None:
        return np.random.default_rng(0).integers(0, manifest.vocab_size, count)
    return np.asarray(Tokenizer.load(directory).encode(REPORT_TEXT)[:count], np.int64)


class _Score:
    """The likelihood of each token given those before it."""

    def __init__(self, tokens: npt.NDArray[np.int64]) -> None:
        self._tokens = tokens
        self._seen = 0
        self._surprise: list[float] = []

    def add(self, logits: npt.NDArray[Any]) -> None:
        """The logits [n, V] of the next n positions."""
        wide = logits.astype(np.float64)
        peak = wide.max(-1, keepdims=True)
        total = np.log(np.exp(wide - peak).sum(-1)) + peak[:, 0]
        for offset in range(len(wide)):
            following = self._seen + offset + 1
            if following < len(self._tokens):
                self._surprise.append(float(total[offset] - wide[offset, self._tokens[following]]))
        self._seen += len(wide)

    @property
    def perplexity(self) -> float:
        return float(np.exp(np.mean(self._surprise)))
