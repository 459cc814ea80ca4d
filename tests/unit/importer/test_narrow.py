"""Weights of 4 and 6 bits: never worse than plain rounding, within the budget, and the same codes in onnxruntime, XLA and the kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ort_chain import Chain
from tiny_models import LLAMA, logits_of, make_model, torch

from mesh.errors import ConfigError
from mesh.importer.options import ImportOptions
from mesh.importer.precision import BUDGET, Surveyed, bits_of, choose, groups_of_a_step
from mesh.importer.run import import_model
from mesh.importer.sources.safetensors import open_source
from mesh.importer.write.blocks import BlockWriter
from mesh.importer.write.narrow import LEVELS, compensated, fit, packed
from mesh.lowering.linear import Codes
from mesh.lowering.weights import PackedWeight
from mesh.runtime.loading import load_block

FLOAT = np.dtype(np.float32)


def plain(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """`weight` [out, in] rounded to the nearest of evenly spaced numbers between the least and the largest of each group, whose scale and
    minimum are themselves rounded to 8 bits."""
    out, depth = weight.shape
    each = groups_of_a_step(depth // group)
    grouped = weight.reshape(out, -1, group)

    def in_steps(numbers: np.ndarray) -> np.ndarray:
        steps = (numbers.reshape(out, -1, each).max(-1, keepdims=True) / np.float32(LEVELS)).astype(np.float32)
        codes = np.rint(numbers.reshape(out, -1, each) / np.where(steps > 0, steps, 1))
        return (codes * steps).reshape(out, -1, 1)

    if bits == 6:
        scale = in_steps(np.abs(grouped).max(-1) / 31)
        codes = np.rint(grouped / np.where(scale > 0, scale, np.inf)).clip(-32, 31)
        return (codes * scale).reshape(out, depth)
    low = np.minimum(grouped.min(-1), 0)
    scale, minimum = in_steps(np.maximum(grouped.max(-1) - low, 0) / 15), in_steps(-low)
    codes = np.rint((grouped + minimum) / np.where(scale > 0, scale, np.inf)).clip(0, 15)
    return (codes * scale - minimum).reshape(out, depth)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.sampled_from([64, 192, 576]),
    st.sampled_from([4, 6]),
    st.sampled_from([16, 32, 64]),
    st.sampled_from(["normal", "heavy", "positive", "sparse", "zero", "tiny"]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_rounding_is_never_worse_than_plain_rounding(
    out: int, depth: int, bits: int, group: int, kind: str, weighted: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = {
        "normal": lambda: rng.standard_normal((out, depth)),
        "heavy": lambda: rng.standard_t(2, (out, depth)).clip(-100, 100),
        "positive": lambda: rng.random((out, depth)) + 3,
        "sparse": lambda: np.where(rng.random((out, depth)) < 0.02, rng.standard_normal((out, depth)), 0),
        "zero": lambda: np.zeros((out, depth)),
        "tiny": lambda: rng.standard_normal((out, depth)) * 1e-6,
    }[kind]().astype(np.float32)
    importance = np.exp(3 * rng.standard_normal(depth)) if weighted else None
    counts = np.ones(depth) if importance is None else importance / importance.mean() + 1e-3
    narrow = fit(weight, bits, group, FLOAT, importance)  # type: ignore[arg-type]
    ours = (counts * np.square(narrow.numbers() - weight, dtype=np.float64)).sum()
    theirs = (counts * np.square(plain(weight, bits, group) - weight, dtype=np.float64)).sum()
    assert ours <= theirs * (1 + 1e-4) + 1e-12 * np.square(weight, dtype=np.float64).sum()
    assert narrow.codes.max(initial=0) < 1 << bits


def test_searched_ranges_beat_plain_rounding_on_random_weights() -> None:
    weight = np.random.default_rng(0).standard_normal((256, 576)).astype(np.float32)
    ours, theirs = (np.square(each - weight).sum() for each in (fit(weight, 4, 32, FLOAT).numbers(), plain(weight, 4, 32)))
    assert ours < 0.88 * theirs


def test_weights_that_are_on_a_grid_of_sixteen_numbers_stay_there() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (64, 18, 32))
    codes[..., 0], codes[..., 1] = 0, 15  # as whoever has rounded to such a grid has stretched it
    weight = (codes * rng.uniform(0.5, 2, (64, 18, 1)) - rng.uniform(6, 9, (64, 18, 1))).reshape(64, 576).astype(np.float32)
    narrow = fit(weight, 4, 32, FLOAT)
    assert (narrow.codes == codes.reshape(64, 576)).mean() > 0.999
    assert np.abs(narrow.numbers() - weight).max() < 0.1


def test_inputs_that_count_more_are_rounded_better() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((128, 64)).astype(np.float32)
    importance = np.where(np.arange(64) % 8 == 0, 50.0, 0.1)
    before, after = (np.square(fit(weight, 4, 32, FLOAT, each).numbers() - weight) for each in (None, importance))
    assert after[:, importance > 1].mean() < 0.5 * before[:, importance > 1].mean()


def test_compensated_codes_change_the_product_less() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, 16)) @ rng.standard_normal((16, 128)) + 0.3 * rng.standard_normal((512, 128))
    weight = rng.standard_normal((96, 128)).astype(np.float32)
    narrow = fit(weight, 4, 32, FLOAT, np.square(x).mean(0))
    moments = (x.T @ x / len(x)).astype(np.float32)
    better = compensated(weight, narrow, moments)
    errors = [float(np.square(x @ (each.numbers() - weight).T).mean()) for each in (narrow, better)]
    assert errors[1] < 0.6 * errors[0]
    assert better.scale is narrow.scale


def test_compensation_is_left_where_the_inputs_say_nothing() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    narrow = fit(weight, 4, 32, FLOAT)
    assert compensated(weight, narrow, np.full((64, 64), np.nan, np.float32)) is narrow


@pytest.mark.parametrize("bits", [4, 6])
def test_packed_codes_are_what_the_kernels_read(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (5, 128)).astype(np.uint8)
    low, high = packed(codes, bits)  # type: ignore[arg-type]
    read = Codes(low, high=high, bits=bits).integers(np.int32)
    np.testing.assert_array_equal(np.asarray(read), codes)


def decoder(layers: int, hidden: int, mlp: int, kv: int, vocabulary: int) -> list[Surveyed]:
    """The weights of a decoder of the usual kind."""
    outputs = {"q": hidden, "k": kv, "v": kv, "o": hidden, "gate": mlp, "up": mlp}
    shapes = {**{name: (hidden, out) for name, out in outputs.items()}, "down": (mlp, hidden)}
    found = [Surveyed(("embed", "tokens"), "tokens", (vocabulary, hidden))]
    found += [Surveyed((f"layer_{i:03d}", name), "product", shape, i) for i in range(layers) for name, shape in shapes.items()]
    return [*found, Surveyed(("head", "logits"), "head", (hidden, vocabulary))]


@pytest.mark.parametrize(
    ("sizes", "tied"),
    [((30, 576, 1536, 192, 49152), True), ((32, 4096, 14336, 1024, 128256), False), ((24, 2048, 5632, 2048, 32000), True)],
)
def test_the_chosen_bits_stay_within_the_budget_and_use_it(sizes: tuple[int, int, int, int, int], tied: bool) -> None:
    weights = decoder(*sizes)
    chosen = choose(weights, 0, layers=sizes[0], group=32, step_bits=32, tied=tied)
    once = [weight for weight in weights if not (tied and weight.role == "tokens")]
    total = 0.0
    for weight in once:
        bits = chosen[weight.key].bits
        assert bits != 8
        total += weight.elements * bits_of(weight.depth, 32, bits)
    mean = total / sum(weight.elements for weight in once)
    assert BUDGET - 0.05 < mean <= BUDGET
    assert chosen["head", "logits"].bits == 6
    if tied:
        assert chosen["embed", "tokens"].bits == 6
    wider = {key for key, choice in chosen.items() if choice.bits == 6 and key[0].startswith("layer")}
    assert wider and {name for _, name in wider} <= {"k", "v", "down"}
    assert ("layer_000", "k" if sizes[3] < sizes[1] else "down") in wider


def test_weights_whose_inputs_are_no_whole_groups_get_eight_bits() -> None:
    weights = [Surveyed(("layer_000", "q"), "product", (60, 64), 0), Surveyed(("layer_000", "up"), "product", (96, 64), 0)]
    chosen = choose(weights, 0, layers=1, group=32, step_bits=32, tied=False)
    assert chosen["layer_000", "q"].bits == 8
    assert chosen["layer_000", "up"].bits == 4  # 6 bits lie in blocks of 64


def symmetric(array: np.ndarray, group: int) -> np.ndarray:
    """[out, in] rounded to whole numbers from -7 to 7 in groups."""
    grouped = array.reshape(len(array), -1, group)
    scale = np.abs(grouped).max(-1, keepdims=True) / 7
    return (np.rint(grouped / scale) * scale).reshape(array.shape)


def test_a_model_of_4_bits_is_nearer_to_its_source_than_plain_rounding(tmp_path: Path) -> None:
    sizes = {**LLAMA, "hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": True}
    model = make_model("Llama", sizes, tmp_path / "source")
    prompt = np.random.default_rng(1).integers(0, 199, 40).tolist()
    exact = logits_of(model, prompt)
    manifest = import_model(tmp_path / "source", tmp_path / "model", ImportOptions(bits=4))
    ours = Chain(tmp_path / "model", manifest.cache)(prompt)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.copy_(torch.from_numpy(symmetric(parameter.numpy(), 32)))
    before = logits_of(model, prompt)  # with a table of 32 bits
    assert np.square(ours - exact).mean() < 0.8 * np.square(before - exact).mean()
    assert manifest.report["bits_per_weight"] < 6.0  # scales of few groups each


def test_a_calibration_text_brings_a_model_nearer_to_its_source(tmp_path: Path) -> None:
    sizes = {**LLAMA, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 400}
    model = make_model("Llama", sizes, tmp_path / "source")
    with torch.no_grad():  # channels of very different sizes, as trained models have them
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.mul_(torch.exp(1.5 * torch.randn(128)))
    model.save_pretrained(tmp_path / "source")
    text_tokens = write_tokenizer(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(np.random.default_rng(0).choice(text_tokens, 2000)))
    prompt = np.random.default_rng(1).integers(0, 399, 60).tolist()
    exact = logits_of(model, prompt)
    errors = []
    for name, calibrate in (("plain", None), ("calibrated", text)):
        manifest = import_model(tmp_path / "source", tmp_path / name, ImportOptions(bits=4, calibrate=calibrate))
        errors.append(float(np.square(Chain(tmp_path / name, manifest.cache)(prompt) - exact).mean()))
    assert errors[1] < 0.9 * errors[0]


def write_tokenizer(directory: Path) -> list[str]:
    """A tokenizer of whole words beside a model; returns the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{number}" for number in range(399)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*words, "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    return words


def test_a_calibration_text_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    make_model("Llama", LLAMA, tmp_path / "source")

    def refused(text: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            import_model(tmp_path / "source", tmp_path / "model", ImportOptions(bits=4, calibrate=text))
        return str(caught.value)

    (tmp_path / "short").write_text("w1 w2")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "has no tokenizer" in refused(tmp_path / "short")
    write_tokenizer(tmp_path / "source")
    assert "has 2 tokens" in refused(tmp_path / "short")
    assert "not UTF-8" in refused(tmp_path / "binary")
    assert "cannot be read" in refused(tmp_path / "missing")
    with pytest.raises(ConfigError, match="--bits 4"):
        ImportOptions(bits=8, calibrate=tmp_path / "short")


@pytest.mark.parametrize("kernels", [True, False])
def test_a_head_of_6_bits_is_one_weight_to_the_runtime(tmp_path: Path, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mesh.kernels import library

    if not kernels:
        monkeypatch.setenv("MESH_KERNELS", "none")
        library._found.cache_clear()
    make_model("Llama", {**LLAMA, "hidden_size": 64}, tmp_path / "source")
    open_source(tmp_path / "source").write_blocks(BlockWriter(tmp_path), ImportOptions(bits=4), lambda *_: None)
    block = load_block(tmp_path, "head")
    held = [weight for weight in block.weights.values() if isinstance(weight, PackedWeight)]
    library._found.cache_clear()
    (head,) = held
    assert head.shape == (64, 199)
    if kernels and library.kernels().name is not None:
        assert head.codes.bits == 6
    assert not {node.op.op_type for node in block.lowered.graph.nodes} & {"BitShift", "BitwiseAnd", "DequantizeLinear"}
