"""What a coordinator needs of its model, the manifest and the tokenizer: from a directory, or from the mesh's object store."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from mesh.bus import Bus, ModelStore
from mesh.errors import BadRequest, ConfigError, ModelNotFound
from mesh.model.manifest import Manifest
from mesh.model.signature import Signers, load_trusted

__all__ = ["Wanted", "find_model"]

log = logging.getLogger("mesh.coordinator")

_LOOK_AGAIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which model: the one in the directory `path`, else the pushed model `name`, else the only pushed model. The other fields must be true
    of it."""

    name: str | None = None
    path: Path | None = None
    format: str | None = None
    total_layers: int | None = None
    vocab_size: int | None = None

    def check(self, manifest: Manifest) -> None:
        """Raises ConfigError with the key that is not true of the model."""
        found = {"name": manifest.name, "format": manifest.source, "total_layers": manifest.layers, "vocab_size": manifest.vocab_size}
        for key, value in found.items():
            said = getattr(self, key)
            if said is not None and said != value:
                raise ConfigError(f"model.{key} is {said}, and the model's is {value}: correct it, or leave it out")


async def find_model(bus: Bus, wanted: Wanted, signers: Signers | None = None) -> Path:
    """A directory with the model's manifest and tokenizer. Waits, and logs it, until the model has been pushed.

    Raises UntrustedModel where none of `signers` has signed the model, ConfigError where there are several models and none is named, or
    where a field of `wanted` is not true of the model, and ModelNotFound where there is none at `path`.
    """
    if wanted.path is not None:
        directory = wanted.path.expanduser()
        wanted.check(load_trusted(directory, signers))
        return directory
    store, said = ModelStore(bus, signers), False
    while True:
        try:
            directory = await store.pull_description(wanted.name or await store.only_name())
            break
        except BadRequest as error:
            raise ConfigError(f"{error}: with model.name in the file, or --model NAME") from None
        except ModelNotFound as error:
            if not said:
                log.warning("%s, or give its directory with model.path; waiting for it", error)
            said = True
        await asyncio.sleep(_LOOK_AGAIN_S)
    manifest = load_trusted(directory, signers)
    wanted.check(manifest)
    log.info("model %s (%s) from the object store", manifest.name, manifest.model_hash)
    return directory
