"""`mesh models`: the models of a mesh, and those that are kept on this machine."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.commands.connection import add_connection_arguments, bus_options
from mesh.errors import BadRequest, MeshError, ModelNotFound
from mesh.settings.units import format_bytes

if TYPE_CHECKING:
    from mesh.client import AsyncMeshClient
    from mesh.model.manifest import Manifest

__all__ = ["add_parser"]

_DESCRIPTION = """\
List the models that were pushed to a mesh (`mesh push`), how many shards serve each, and the copies in this machine's cache.
`mesh models remove` deletes one."""
_REMOVE = """\
Remove a model from the mesh's store; files that another model has too stay. Shards that serve it go on, but no further shard can fetch
it. With --local, remove the copies of it in this machine's cache instead."""


@dataclass(frozen=True)
class _Line:
    """`where`: "mesh", or the folder of a copy. `shards`: how many serve it; None: of a copy, unknown."""

    name: str
    where: str
    layers: int
    bits: int
    context: int
    bytes: int
    shards: int | None


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("models", help="list and remove models", description=_DESCRIPTION)
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")
    parser.add_argument("--json", action="store_true", help="print one object a line")
    add_connection_arguments(parser)
    parser.set_defaults(run=_list)
    # What is not given after the word leaves what was given before it.
    listing = verbs.add_parser(
        "list", help="list the models, as without a command", description=_DESCRIPTION, argument_default=argparse.SUPPRESS
    )
    listing.add_argument("--json", action="store_true", help="print one object a line")
    add_connection_arguments(listing)
    listing.set_defaults(run=_list)
    remove = verbs.add_parser("remove", help="remove a model", description=_REMOVE, argument_default=argparse.SUPPRESS)
    remove.add_argument("name", metavar="NAME", help="as `mesh models` lists it")
    remove.add_argument("--local", action="store_true", default=False, help="the copies in this machine's cache, not the mesh's model")
    remove.add_argument("--force", action="store_true", default=False, help="also if shards serve it")
    add_connection_arguments(remove)
    remove.set_defaults(run=_remove)


def _list(args: argparse.Namespace) -> int:
    try:
        lines = asyncio.run(_of_the_mesh(args))
    except MeshError as error:
        print(f"mesh: {error}", file=sys.stderr)
        lines = []
    lines += [_line(manifest, str(folder), None) for folder, manifest in _copies()]
    if args.json:
        for line in lines:
            print(json.dumps(asdict(line)))
    else:
        _print_table(lines)
    return 0


async def _of_the_mesh(args: argparse.Namespace) -> list[_Line]:
    from mesh.bus import Bus, ModelStore
    from mesh.client import AsyncMeshClient

    options = bus_options(args)
    async with await Bus.connect(options, name="mesh-models") as bus, AsyncMeshClient(options=options) as client:
        store, serving = ModelStore(bus), await _serving(client)
        return [_line(await store.manifest(name), "mesh", serving.get(name, 0)) for name in await store.names()]


async def _serving(client: AsyncMeshClient) -> dict[str, int]:
    """How many shards serve each model."""
    shards = [shard.model for shard in (await client.status()).shards]
    return {name: shards.count(name) for name in set(shards)}


def _line(manifest: Manifest, where: str, shards: int | None) -> _Line:
    size = sum(file.bytes for block in manifest.blocks for file in block.files)
    return _Line(manifest.name, where, manifest.layers, manifest.weights.bits, manifest.context_length, size, shards)


def _copies() -> list[tuple[Path, Manifest]]:
    """The model directories in this machine's cache: fetched from a mesh, or imported."""
    from mesh.host.paths import cache_directory
    from mesh.model.manifest import Manifest

    found = []
    for path in sorted(cache_directory().glob("*/*/manifest.json")):
        try:
            found.append((path.parent, Manifest.load(path.parent)))
        except MeshError:
            continue  # not whole; `mesh join` makes it whole
    return found


def _print_table(lines: list[_Line]) -> None:
    if not lines:
        print("no models: `mesh import SRC models/NAME` makes one, `mesh push models/NAME` copies it into a mesh")
        return
    width = max(len(line.name) for line in lines)
    print(f"{'MODEL':{width}}  {'LAYERS':>6}  {'BITS':>4}  {'CONTEXT':>8}  {'SIZE':>8}  WHERE")
    for line in lines:
        where = line.where if line.shards is None else f"the mesh, {line.shards or 'no'} shard{'' if line.shards == 1 else 's'}"
        print(f"{line.name:{width}}  {line.layers:6}  {line.bits:4}  {line.context:8,}  {format_bytes(line.bytes):>8}  {where}")


def _remove(args: argparse.Namespace) -> int:
    if args.local:
        return _remove_copies(args.name)
    print(f"{args.name} is removed from the mesh: {format_bytes(asyncio.run(_remove_from_mesh(args)))}")
    return 0


def _remove_copies(name: str) -> int:
    folders = [folder for folder, manifest in _copies() if manifest.name == name]
    if not folders:
        raise ModelNotFound(f"the cache has no copy of {name}: `mesh models` lists what it has")
    for folder in folders:
        shutil.rmtree(folder)
        print(f"{folder} is removed")
    return 0


async def _remove_from_mesh(args: argparse.Namespace) -> int:
    from mesh.bus import Bus, ModelStore
    from mesh.client import AsyncMeshClient

    options = bus_options(args)
    async with await Bus.connect(options, name="mesh-models") as bus, AsyncMeshClient(options=options) as client:
        serving = (await _serving(client)).get(args.name, 0)
        if serving and not args.force:
            raise BadRequest(
                f"{serving} shard{'s' if serving > 1 else ''} serve{'' if serving > 1 else 's'} {args.name}, and no other could be started "
                "without it in the store: drain them first, or give --force",
                field="name",
            )
        return await ModelStore(bus).remove(args.name)
