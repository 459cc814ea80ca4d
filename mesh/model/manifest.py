"""`manifest.json`: what a model directory holds. The one place its keys are defined; docs/model-format.md explains the blocks."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
from math import prod
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from mesh.errors import BadLayerRange, CorruptModel, ModelNotFound, decoding
from mesh.host.paths import open_inside
from mesh.protocol.documents import problem
from mesh.types import CacheDType, DType, LayerRange

__all__ = [
    "EXTRA_FILES",
    "FORMAT",
    "MAX_EXTRA_BYTES",
    "MAX_LAYERS",
    "MAX_MANIFEST_BYTES",
    "BlockInfo",
    "CacheInfo",
    "FileInfo",
    "HiddenInfo",
    "Manifest",
    "SignatureInfo",
    "StateInfo",
    "TokenizerInfo",
    "WeightsInfo",
    "block_name",
]

FORMAT: Final = 1
FILE_NAME = "manifest.json"

# Bounds of everything that a manifest from elsewhere can say: far above any model, far below what would hurt to hold or to loop over.
MAX_MANIFEST_BYTES: Final = 16 * 1024 * 1024
MAX_LAYERS: Final = 4096
MAX_EXTRA_BYTES: Final = {"tokenizer.json": 256 * 1024 * 1024, "chat_template.jinja": 1024 * 1024}
"""What may lie beside the blocks, and its size at most. The largest tokenizers have 35 MB, the longest templates 30 KB."""
EXTRA_FILES: Final = frozenset(MAX_EXTRA_BYTES)
_MAX_COUNT: Final = 2**53
Count = Annotated[int, Field(ge=0, le=_MAX_COUNT)]
Positive = Annotated[int, Field(ge=1, le=_MAX_COUNT)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]
"""A name in the model's own directory: no separator, no leading dot."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileInfo(_Strict):
    name: FileName
    bytes: Count
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class BlockInfo(_Strict):
    """One block. `weight_bytes` is what its weights take in memory as stored (quantized ones at their stored width)."""

    name: FileName  # embed, layer_000, ..., head
    files: Annotated[tuple[FileInfo, ...], Field(max_length=2)]  # the .onnx file, then its .onnx.data if it has one
    weight_bytes: Count
    parameters: Count  # number of weight elements


class StateInfo(_Strict):
    """A state of a row that a layer carries from token to token: `shape` numbers of float32, however many tokens there were."""

    shape: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=8)]

    @property
    def bytes(self) -> int:
        return 4 * prod(self.shape)


class CacheInfo(_Strict):
    """What one layer keeps of a row: keys and values of each position, states, or both. Numbers for a token in a row: kv_heads * (key_dim +
    value_dim). A layer without attention has none of these three."""

    kv_heads: Count
    key_dim: Count
    value_dim: Count
    window: Positive | None = None  # the most positions that a token sees, by a sliding window or in chunks; None: the whole context
    states: Annotated[tuple[StateInfo, ...], Field(max_length=16)] = ()

    @property
    def attends(self) -> bool:
        return self.kv_heads > 0

    @model_validator(mode="after")
    def _keeps_something(self) -> Self:
        sizes = (self.kv_heads, self.key_dim, self.value_dim)
        if not all(sizes) and (any(sizes) or not self.states):
            raise ValueError("a layer needs kv_heads, key_dim and value_dim, or states and none of these")
        return self


class HiddenInfo(_Strict):
    """The tensor that crosses every cut: [batch, chunk, size]."""

    size: Positive
    dtype: DType


class WeightsInfo(_Strict):
    """How weights are stored: bits 32, 16, 8 or 4; group_size None: per output channel (or not quantized). `kept`: the names of the
    source's own quantization, which most of the weights have; `bits` is then the nearest width. `inputs`: what products round their inputs
    to (None: nothing); the blocks say it, and this is for readers."""

    bits: Literal[32, 16, 8, 4]
    group_size: Positive | None = None
    kept: Annotated[str, Field(max_length=200)] | None = None
    inputs: Literal["bfloat16"] | None = None


class TokenizerInfo(_Strict):
    """What generation needs to know beside tokenizer.json: token ids, and whether a plain prompt gets a leading bos (`add_bos`), or other
    leading tokens (`leading_ids`)."""

    bos_id: TokenId | None = None
    eos_ids: Annotated[tuple[TokenId, ...], Field(max_length=4096)] = ()
    add_bos: bool = False
    leading_ids: Annotated[tuple[TokenId, ...], Field(max_length=64)] = ()
    chat_template: bool = False

    @property
    def leading(self) -> tuple[int, ...]:
        """The tokens before a plain prompt."""
        bos = (self.bos_id,) if self.add_bos and self.bos_id is not None else ()
        return self.leading_ids or bos


class SignatureInfo(_Strict):
    """An ed25519 signature of `Manifest.signed_bytes`; mesh/model/signature.py makes and checks it. Both in hex."""

    key: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]  # the public key
    value: Annotated[str, StringConstraints(pattern="^[0-9a-f]{128}$")]


class Manifest(_Strict):
    format: Literal[1] = FORMAT
    name: Annotated[str, Field(min_length=1, max_length=256)]
    architecture: Annotated[str, Field(max_length=256)]  # family name as the source gives it; for display only
    source: Literal["onnx", "safetensors", "gguf"]
    layers: int = Field(ge=1, le=MAX_LAYERS)
    vocab_size: int = Field(ge=1, lt=2**31)
    context_length: int = Field(ge=1, lt=2**31)  # the most positions a row may have
    hidden: HiddenInfo
    cache: Annotated[tuple[CacheInfo, ...], Field(max_length=MAX_LAYERS)]  # one a layer
    cache_dtype: CacheDType
    weights: WeightsInfo
    blocks: Annotated[tuple[BlockInfo, ...], Field(max_length=MAX_LAYERS + 2)]  # embed, the layers in order, head
    tokenizer: TokenizerInfo | None = None
    extra_files: Annotated[tuple[FileInfo, ...], Field(max_length=16)] = ()  # tokenizer.json, chat_template.jinja
    report: dict[str, Any] = Field(default_factory=dict)  # what verification measured
    signature: SignatureInfo | None = None

    @property
    def has_states(self) -> bool:
        """Whether some layer carries a state: then a row can be gone on with only where its states stand."""
        return any(layer.states for layer in self.cache)

    @property
    def model_hash(self) -> str:
        """16 hex digits, equal if and only if every block is equal, and the type of keys and values: tokens depend on nothing else. A stage
        refuses frames that carry another hash."""
        digest = hashlib.sha256()
        for block in self.blocks:
            for file in block.files:
                digest.update(file.sha256.encode())
        if self.cache_dtype != self.hidden.dtype:
            digest.update(self.cache_dtype.encode())
        return digest.hexdigest()[:16]

    def signed_bytes(self) -> bytes:
        """What a signature covers: the whole manifest but the signature, and so the hash of every file, in one canonical form.

        Keys are sorted and defaults are left out, so that a key that a later version adds does not change the bytes of older manifests.
        """
        values = self.model_dump(mode="json", exclude={"signature"}, exclude_defaults=True)
        return b"stagemesh manifest\n" + orjson.dumps(values, option=orjson.OPT_SORT_KEYS)

    @property
    def digest(self) -> str:
        """SHA-256 of `signed_bytes`: equal only for models that are equal in everything, tokenizer and chat template included."""
        return hashlib.sha256(self.signed_bytes()).hexdigest()

    def block(self, name: str) -> BlockInfo:
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(name)

    def check_range(self, layers: LayerRange) -> LayerRange:
        """`layers` itself, or BadLayerRange."""
        if not (0 <= layers.start < layers.stop <= self.layers):
            raise BadLayerRange(
                f"layer range {layers} is not inside {self.name}, which has layers 0-{self.layers}: "
                f"give 0 <= start < stop <= {self.layers} (the stop is not included)"
            )
        return layers

    def save(self, directory: Path) -> None:
        """Write the file whole or not at all: others may read it meanwhile, or write it too."""
        fresh = directory / f".{FILE_NAME}.{secrets.token_hex(8)}"
        fresh.write_bytes(orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_INDENT_2))
        fresh.replace(directory / FILE_NAME)

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        path = Path(directory) / FILE_NAME
        try:
            with open_inside(Path(directory), FILE_NAME) as file:
                data = file.read(MAX_MANIFEST_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise ModelNotFound(
                f"{directory} is not a model directory (no {FILE_NAME}): make one with `mesh import SRC {directory}`"
            ) from None
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """The manifest in `data`, which came from `where`; CorruptModel names the first key that is wrong.

        Nothing in it can name a file outside the model's own directory.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise CorruptModel(f"{where} has more than {MAX_MANIFEST_BYTES:,} bytes, which no manifest needs; import the model again")
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            key, _, said = problem(error)
            raise CorruptModel(f"{where}: {key or 'the document'}: {said}; import the model again") from None
        expected = [block_name("embed"), *(block_name(i) for i in range(manifest.layers)), block_name("head")]
        if [block.name for block in manifest.blocks] != expected or len(manifest.cache) != manifest.layers:
            raise CorruptModel(f"{where}: blocks or caches do not match layers = {manifest.layers}; import the model again")
        for block in manifest.blocks:
            names = [file.name for file in block.files]
            if names != [f"{block.name}.onnx", f"{block.name}.onnx.data"][: len(names)]:
                raise CorruptModel(f"{where}: block {block.name} has files {names}; import the model again")
        extra = [file.name for file in manifest.extra_files]
        if not set(extra) <= EXTRA_FILES or len(set(extra)) < len(extra):
            allowed = ", ".join(sorted(EXTRA_FILES))
            raise CorruptModel(f"{where}: extra_files are {extra}: only {allowed} may be there, each once; import the model again")
        with decoding(CorruptModel, f"{where}: report"):  # any JSON can be in it; what cannot be written again cannot be signed or kept
            manifest.signed_bytes()
        return manifest

    def verify_files(self, directory: Path, layers: LayerRange, *, checksums: bool, embed: bool = False, head: bool = False) -> None:
        """Check that the files of a range are there and whole; CorruptModel names the first that is not.

        Sizes are always compared; sha256 only with `checksums`, which reads every byte.
        """
        names = [block_name(i) for i in layers]
        if embed:
            names.insert(0, block_name("embed"))
        if head:
            names.append(block_name("head"))
        for name in names:
            self.verify_block(directory, name, checksums=checksums)

    def verify_all(self, directory: Path) -> None:
        """The same for every file of the model, with checksums."""
        self.verify_files(directory, LayerRange(0, self.layers), checksums=True, embed=True, head=True)
        for file in self.extra_files:
            self.read_extra(directory, file.name)

    def verify_block(self, directory: Path, name: str, *, checksums: bool) -> None:
        """The same for the files of one block."""
        for file in self.block(name).files:
            check_file(Path(directory) / file.name, file, checksum=checksums)

    def read_extra(self, directory: Path, name: str) -> bytes:
        """The content of tokenizer.json or chat_template.jinja. CorruptModel: it is missing, too large, or not the manifest's."""
        expected = next((file for file in self.extra_files if file.name == name), None)
        if expected is None:
            raise CorruptModel(f"{directory}: the manifest does not list {name}: import the model again")
        limit = MAX_EXTRA_BYTES[name]
        if expected.bytes > limit:
            raise CorruptModel(f"{name} has {expected.bytes:,} bytes, where {limit:,} are the most: no model needs more")
        path = Path(directory) / name
        with _opened(path, expected) as file:
            data = file.read(expected.bytes + 1)
        if hashlib.sha256(data).hexdigest() != expected.sha256:
            raise CorruptModel(f"{path} does not match its checksum: fetch or import the model again")
        return data


def block_name(block: int | Literal["embed", "head"]) -> str:
    """File stem of a block: embed, head, or layer_NNN."""
    return f"layer_{block:03d}" if isinstance(block, int) else block


def file_info(path: Path) -> FileInfo:
    return FileInfo(name=path.name, bytes=path.stat().st_size, sha256=sha256(path))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, expected: FileInfo, *, checksum: bool) -> None:
    """CorruptModel unless `path` is a file of its own directory with the expected size and, with `checksum`, content."""
    with _opened(path, expected) as file:
        if checksum and hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
            raise CorruptModel(f"{path} does not match its checksum: fetch or import the model again")


def _opened(path: Path, expected: FileInfo) -> io.BufferedReader:
    """`path`, open for reading. CorruptModel: it is missing, has another size, or lies outside its directory."""
    try:
        file = open_inside(path.parent, path.name)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        why = "is missing" if missing else f"cannot be opened ({error.strerror})"
        raise CorruptModel(f"{path} {why}: fetch or import the model again") from None
    size = os.fstat(file.fileno()).st_size
    if size != expected.bytes:
        file.close()
        raise CorruptModel(f"{path} has {size:,} bytes where the manifest says {expected.bytes:,}: fetch or import the model again")
    return file
