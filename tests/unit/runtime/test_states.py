"""What a row gets that asks for an embedding: the hidden state of its last position after the final norm, compared with others' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from places import EXPORTS

from mesh.importer.run import import_model
from mesh.lowering import lower
from mesh.lowering.operands import operands
from mesh.lowering.states import before_vocabulary
from mesh.protocol.frame import EMBEDDED
from mesh.runtime.engine import SampledToken, Segments
from mesh.runtime.generate import Pipeline
from mesh.runtime.programs import Compiled
from mesh.runtime.recompute import RecomputingStage
from mesh.runtime.sampling import SamplingParams
from mesh.runtime.stage import Stage, StageConfig
from mesh.types import LayerRange

EMBED = SamplingParams(embed=True)
ARCHITECTURES = ["gpt2", "opt", "llama", "gemma3"]


def states_of_source(path: Path, tokens: list[int]) -> np.ndarray:
    """The left operand of the export's product with the vocabulary [T, D], in stock onnxruntime."""
    model = onnx.load(path)
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    model.graph.output.append(onnx.ValueInfoProto(name=products[-1].input[0]))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    fed: dict[str, Any] = {}
    for each in session.get_inputs():
        if len(each.shape) >= 4:
            shape = [0 if axis == len(each.shape) - 2 else dim if isinstance(dim, int) else 1 for axis, dim in enumerate(each.shape)]
            fed[each.name] = np.zeros(shape, np.float32)
        else:
            values = {"input_ids": tokens, "attention_mask": [1] * len(tokens), "position_ids": list(range(len(tokens)))}
            fed[each.name] = np.array([values[each.name]], np.int64)
    return np.asarray(session.run([products[-1].input[0]], fed)[0]).reshape(len(tokens), -1)


def state(token: SampledToken) -> np.ndarray:
    assert token.id == EMBEDDED and token.state is not None and token.state.dtype == np.float32
    return token.state


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * float(np.abs(theirs).max()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_what_the_source_multiplies_with_the_vocabulary_for_any_number_of_shards(architecture: str, tmp_path: Path) -> None:
    path, out = EXPORTS / f"{architecture}-dynamo.onnx", tmp_path / "model"
    manifest = import_model(path, out)
    prompt = np.random.default_rng(5).integers(0, manifest.vocab_size, 37).tolist()
    expected = states_of_source(path, prompt)[-1]
    compiled: Compiled = {}
    for shards in (1, 2, 3) if architecture == "llama" else (2,):
        pipeline = Pipeline.load(out, shards=shards, context=64, chunk=16, compiled=compiled)
        assert pipeline.stages[-1].embeds and not any(stage.embeds for stage in pipeline.stages[:-1])
        close(state(pipeline.start(0, prompt, EMBED, max_tokens=1)), expected)


@pytest.mark.parametrize("architecture", ["Llama", "OPT"])
def test_it_is_the_last_hidden_state_of_transformers(architecture: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tiny = pytest.importorskip("tiny_models")
    own = {"ffn_dim": 100, "word_embed_proj_dim": 40} if architecture == "OPT" else {}
    model = tiny.make_model(architecture, {**tiny.LLAMA, **own}, tmp_path / "source")
    manifest = import_model(tmp_path / "source", tmp_path / "model")
    prompt = np.random.default_rng(6).integers(0, manifest.vocab_size, 29).tolist()
    with torch.no_grad():
        expected = model.base_model(torch.tensor([prompt])).last_hidden_state[0, -1].numpy()
    for shards in (1, 2, 3):
        pipeline = Pipeline.load(tmp_path / "model", shards=shards, context=64, chunk=16)
        close(state(pipeline.start(0, prompt, EMBED, max_tokens=1)), expected)


def test_a_packed_step_brings_tokens_and_states_of_several_rows(llama: Path) -> None:
    stage = Stage.load(llama, StageConfig(LayerRange(0, 5), rows=4, context=64, chunk=16))
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, stage.manifest.vocab_size, length).tolist() for length in (9, 1, 5, 4)]
    params = [EMBED, SamplingParams(), EMBED, SamplingParams(logprobs=2)]
    alone = []
    for prompt, each in zip(prompts, params, strict=True):
        stage.open(0, each, prompt_length=len(prompt))
        alone.append(stage.prefill(0, 0, np.array(prompt, np.int32)))
    for row, each in enumerate(params):
        stage.open(row, each, prompt_length=len(prompts[row]))
    counts = [len(prompt) for prompt in prompts]
    answers = stage.packed(
        Segments(range(4), [0] * 4, counts, [True] * 4), np.concatenate([np.array(prompt, np.int32) for prompt in prompts])
    )
    for row in (0, 2):
        close(state(answers[row]), state(alone[row]))  # type: ignore[arg-type]
    assert [answers[row].id for row in (1, 3)] == [alone[row].id for row in (1, 3)]  # type: ignore[union-attr]
    assert len(answers[3].top) == 2  # type: ignore[union-attr]


def test_one_token_after_a_beginning_that_was_copied_gives_the_same_state(llama: Path) -> None:
    """What a session does that reuses nearly all of its prompt, in a decode step beside one that draws tokens."""
    stage = Stage.load(llama, StageConfig(LayerRange(0, 5), rows=4, context=64, chunk=16))
    prompt = np.random.default_rng(8).integers(0, stage.manifest.vocab_size, 17).astype(np.int32)
    stage.open(0, EMBED, prompt_length=17)
    whole = stage.prefill(0, 0, prompt)
    stage.copy(0, 2, 16)
    stage.open(2, EMBED, prompt_length=17)
    stage.open(1, SamplingParams(), prompt_length=3)
    stage.prefill(1, 0, prompt[:3])
    both = stage.decode(np.array([1, 2]), np.array([3, 16]), np.array([int(prompt[3]), int(prompt[16])]))
    assert both[0].id >= 0
    close(state(both[1]), state(whole))  # type: ignore[arg-type]


def test_a_row_that_is_opened_for_tokens_again_gets_tokens(llama: Path) -> None:
    stage = Stage.load(llama, StageConfig(LayerRange(0, 5), rows=1, context=64, chunk=16))
    tokens = np.arange(5, dtype=np.int32)
    stage.open(0, EMBED, prompt_length=5)
    state(stage.prefill(0, 0, tokens))  # type: ignore[arg-type]
    stage.open(0, SamplingParams(), prompt_length=5)
    token = stage.prefill(0, 0, tokens)
    assert isinstance(token, SampledToken) and token.id >= 0 and token.state is None


def test_a_stage_without_caches_gives_the_same(llama: Path) -> None:
    config = StageConfig(LayerRange(0, 5), rows=2, context=64, chunk=16)
    tokens = np.arange(3, 20, dtype=np.int32)
    answers = []
    for kind in (Stage, RecomputingStage):
        stage = kind.load(llama, config)
        assert stage.embeds
        stage.open(1, EMBED, prompt_length=17)
        answers.append(state(stage.prefill(1, 0, tokens)))  # type: ignore[arg-type]
    close(answers[1], answers[0])


def test_nothing_is_compiled_after_the_start(llama: Path) -> None:
    stage = Stage.load(llama, StageConfig(LayerRange(0, 5), rows=2, context=64, chunk=16))
    stage.warm_up()
    stage.exercise()
    compiled = stage.compiled
    stage.open(0, EMBED, prompt_length=5)
    state(stage.prefill(0, 0, np.arange(5, dtype=np.int32)))  # type: ignore[arg-type]
    assert stage.compiled == compiled


def test_a_head_with_two_products_of_the_vocabulary_is_not_cut(llama: Path) -> None:
    head = onnx.load(llama / "head.onnx", load_external_data=False)
    product = next(node for node in head.graph.node if node.op_type == "MatMul")
    weight = next(each for each in head.graph.initializer if each.name == product.input[1])
    other = onnx.TensorProto()
    other.CopyFrom(weight)
    other.name = "other"
    head.graph.initializer.append(other)
    logits, product.output[0] = product.output[0], "first"
    head.graph.node.append(onnx.helper.make_node("MatMul", [product.input[0], "other"], ["second"]))
    head.graph.node.append(onnx.helper.make_node("Add", ["first", "second"], [logits]))
    lowered = lower(head, base_dir=llama)
    graph, found = operands(lowered)
    assert len(found) == 2
    assert before_vocabulary(lowered, graph, found, 131) is None
