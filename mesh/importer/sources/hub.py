"""`hf:ORG/NAME`: the files of a model on the Hugging Face hub, fetched into that library's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from mesh.errors import ConfigError, ModelNotFound

__all__ = ["fetch", "is_hub_name"]

_NAME = re.compile(r"^hf:(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?$")
_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.jinja",
    "vocab.*",
    "merges.txt",
]


def is_hub_name(source: str | Path) -> bool:
    """Whether a source is written `hf:...`."""
    return str(source).startswith("hf:")


def fetch(source: str | Path) -> Path:
    """The directory of `hf:ORG/NAME` or `hf:ORG/NAME@REVISION`, downloaded where it is not in the cache. ModelNotFound: there is no such
    model, or the hub does not answer. ConfigError: the name is wrong, or the library is missing."""
    named = _NAME.match(str(source))
    if named is None:
        raise ConfigError(f"{source} names no model of the hub: write hf:ORG/NAME, such as hf:HuggingFaceTB/SmolLM2-135M-Instruct")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
    except ImportError:
        raise ConfigError(f"{source} needs the package huggingface_hub: `pip install huggingface_hub`, or give a directory") from None
    repo, otherwise = named["repo"], "download its files elsewhere and give their directory"
    try:
        return Path(snapshot_download(repo, revision=named["revision"], allow_patterns=_FILES))
    except GatedRepoError:
        raise ModelNotFound(f"{source}: the hub asks for an account that may read it: `hf auth login`, then again") from None
    except RepositoryNotFoundError:
        raise ModelNotFound(f"{source}: the hub has no such model, or not for this account: check the name, or `hf auth login`") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:  # LocalEntryNotFoundError is an OSError
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelNotFound(f"{source} is not in the cache, and the hub does not answer ({why}): {otherwise}") from None
    except Exception as error:  # the library's HTTP client raises its own for a connection that fails
        raise ModelNotFound(f"{source}: the hub does not answer ({type(error).__name__}): {otherwise}") from None
