"""What each role may publish and subscribe to, derived from the topics: the one source of server configurations, `mesh doctor` and docs.

Topics name the roles that send and hear them. What is not a topic is stated here: answers, the services of NATS, and for each bucket and
stream of JetStream the roles that make, read and write it. `python -m mesh.protocol.rights` prints the table in docs/security.md.

Answers. A client's answers come to inboxes below its own prefix (`_INBOX.NAME`), and it may subscribe to no other subject. A shard or a
gateway may answer each request once, and no inbox otherwise. A coordinator writes to any inbox: it goes on with requests that another
one received.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from mesh.protocol import subjects, topics
from mesh.protocol.roles import PURPOSES, ROLES, Role
from mesh.settings.defaults import DEFAULT_INBOX_PREFIX
from mesh.types import LayerRange

__all__ = ["STORES", "Binding", "Rights", "Store", "covers", "inbox_prefix", "inbox_user", "rights_of", "table"]

_API: Final = "$JS.API"
_EVERYTHING: Final = ">"


@dataclass(frozen=True, slots=True)
class Rights:
    """Subjects, with wildcards. `answers`: may also answer each request that it hears, once."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    answers: bool = False


@dataclass(frozen=True, slots=True)
class Binding:
    """What of its role one user has. `inbox`: the prefix of its inboxes. `shard`: a shard of this name alone. `layers`: that shard serves
    this range alone, and claims none. `mirror`: it follows the frames of the other replicas of the range."""

    inbox: str = DEFAULT_INBOX_PREFIX
    shard: str | None = None
    layers: LayerRange | None = None
    mirror: bool = False


@dataclass(frozen=True, slots=True)
class Store:
    """A stream of JetStream, or the one under a bucket. The roles that make it, read what is in it, see how full it is, take work from it,
    empty it; and the subjects that a role writes, other than those of topics. `bulky`: its readers ask for messages in numbers."""

    stream: str
    makes: tuple[Role, ...]
    reads: tuple[Role, ...] = ()
    sees: tuple[Role, ...] = ()
    works: tuple[Role, ...] = ()
    purges: tuple[Role, ...] = ()
    writes: dict[Role, tuple[str, ...]] = field(default_factory=dict)
    bulky: bool = False


_SHARDS, _PLACEMENT = f"$KV.{subjects.KV_SHARDS}", f"$KV.{subjects.KV_PLACEMENT}"
_NEW_BATCH: Final = (f"$KV.{subjects.KV_BATCHES}.*.batch",)  # a coordinator answers all who know the id, so nobody lists batches

STORES: Final[tuple[Store, ...]] = (
    Store(
        f"KV_{subjects.KV_SHARDS}",
        makes=("shard",),
        reads=("shard", "coordinator", "gateway", "client", "monitor", "provisioner"),
        writes={"shard": (f"{_SHARDS}.SHARD",), "provisioner": (f"{_SHARDS}.*",)},
    ),
    Store(
        f"KV_{subjects.KV_PLACEMENT}",
        makes=("shard",),
        reads=("shard", "monitor", "provisioner"),
        sees=("coordinator",),
        writes={"shard": (f"{_PLACEMENT}.claims.*",), "provisioner": (f"{_PLACEMENT}.claims.*",)},
    ),
    Store(
        f"KV_{subjects.KV_SESSIONS}",
        makes=("coordinator",),
        reads=("coordinator",),
        sees=("monitor",),
        writes={"coordinator": (f"$KV.{subjects.KV_SESSIONS}.>",)},
    ),
    Store(
        f"KV_{subjects.KV_BATCHES}",
        makes=("coordinator",),
        reads=("coordinator",),
        sees=("monitor",),
        writes={"coordinator": (f"$KV.{subjects.KV_BATCHES}.>",), "gateway": _NEW_BATCH, "client": _NEW_BATCH},
    ),
    Store(
        f"KV_{subjects.KV_RESPONSES}",
        makes=("gateway", "coordinator"),
        reads=("gateway", "coordinator"),
        sees=("monitor",),
        writes={"gateway": (f"$KV.{subjects.KV_RESPONSES}.>",), "coordinator": (f"$KV.{subjects.KV_RESPONSES}.>",)},
    ),
    Store(
        subjects.STREAM_BATCH,
        makes=("coordinator",),
        reads=("coordinator",),
        sees=("monitor",),
        works=("coordinator",),
        purges=("coordinator",),
    ),
    Store(subjects.STREAM_DEAD, makes=("coordinator",), reads=("monitor",), sees=("coordinator",)),
    Store(subjects.STREAM_EVENTS, makes=("coordinator", "shard"), reads=("coordinator", "gateway", "monitor"), sees=("shard",)),
    Store(
        f"OBJ_{subjects.OBJECTS_MODELS}",
        makes=("provisioner",),
        reads=("shard", "coordinator", "provisioner"),
        sees=("monitor",),
        purges=("provisioner",),
        writes={"provisioner": (f"$O.{subjects.OBJECTS_MODELS}.>",)},
        bulky=True,
    ),
)
"""Every stream of the mesh."""

_SERVES: Final[dict[Role, str]] = {"coordinator": subjects.SERVICE_COORDINATOR, "shard": subjects.SERVICE_SHARD}
_FINDS: Final[tuple[Role, ...]] = ("client", "gateway", "coordinator", "monitor", "provisioner")
_VERBS: Final = ("PING", "INFO", "STATS")
_WRITES_TO_INBOXES: Final[tuple[Role, ...]] = ("coordinator",)
_ANSWERS: Final[tuple[Role, ...]] = ("shard", "gateway")
_TRACED: Final[tuple[Role, ...]] = ("coordinator", "shard")  # nats-server asks that of the sender of a frame that it reports


_OF_A_CONNECTION: Final = re.compile(r"[0-9A-Za-z]{22}")
"""What a client's library makes for each connection or inbox: a NUID. Without a prefix of the user's own it comes first."""


def inbox_prefix(name: str) -> str:
    """The inbox prefix of a user of this name."""
    return f"{DEFAULT_INBOX_PREFIX}.{subjects.check_token(name, 'name')}"


def inbox_user(reply: str) -> str:
    """Whose inbox a reply subject is in; empty where it is nobody's own. Without permissions of the server it is what the sender says."""
    root, _, rest = reply.partition(".")
    name = rest.partition(".")[0]
    return "" if root != DEFAULT_INBOX_PREFIX or _OF_A_CONNECTION.fullmatch(name) else name


def rights_of(role: Role, bound: Binding) -> Rights:
    """The least that `role` works with. A system user has its rights in the account of the servers."""
    if role in ("operator", "system"):
        return Rights((_EVERYTHING,), (_EVERYTHING,))
    publish = [topic.pattern(**_places(topic, bound, sends=True)) for topic in topics.TOPICS if role in topic.sends]
    subscribe = [f"{bound.inbox}.>"]
    subscribe += [topic.pattern(**_places(topic, bound, sends=False)) for topic in topics.TOPICS if role in topic.hears]
    if role in _WRITES_TO_INBOXES:
        publish.append(f"{DEFAULT_INBOX_PREFIX}.>")
        subscribe.append(subjects.DISCONNECTS)
    if role in _TRACED:
        publish.append(subjects.SERVER_TRACES)
    if role == "coordinator":
        subscribe.append(subjects.SERVER_TRACES)
    service = _SERVES.get(role)
    if service is not None:
        subscribe += [f"$SRV.{verb}{end}" for verb in _VERBS for end in ("", f".{service}", f".{service}.*")]
    if role in _FINDS:
        publish += [f"$SRV.{verb}{end}" for verb in _VERBS for end in ("", ".>")]
    publish += _jetstream(role, bound)
    return Rights(tuple(dict.fromkeys(publish)), tuple(dict.fromkeys(subscribe)), role in _ANSWERS)


def _places(topic: topics.Topic[object, object], bound: Binding, *, sends: bool) -> dict[str, str]:
    """What the places of a topic are for a shard that is bound to a name, and perhaps to a range."""
    places: dict[str, str] = {}
    if bound.shard is None or (sends and topic is topics.FRAMES):  # it sends frames to other shards
        return places
    if not (topic is topics.FRAMES and bound.mirror):
        places["SHARD"] = bound.shard
    if bound.layers is not None:
        places["A_B"] = str(bound.layers)
    return places


def _jetstream(role: Role, bound: Binding) -> list[str]:
    found = [f"{_API}.INFO", f"{_API}.STREAM.NAMES", "$JS.FC.>"]
    for store in STORES:
        name = store.stream
        if role in store.makes or role in store.reads or role in store.sees or role in store.works:
            found.append(f"{_API}.STREAM.INFO.{name}")
        if role in store.makes:
            found += [f"{_API}.STREAM.CREATE.{name}", f"{_API}.STREAM.UPDATE.{name}"]
        if role in store.reads:
            found += [f"{_API}.STREAM.MSG.GET.{name}", f"{_API}.DIRECT.GET.{name}", f"{_API}.DIRECT.GET.{name}.>"]
            found += [f"{_API}.CONSUMER.CREATE.{name}", f"{_API}.CONSUMER.CREATE.{name}.>"]
            found += [f"{_API}.CONSUMER.INFO.{name}.*", f"{_API}.CONSUMER.DELETE.{name}.*"]
            found += [f"{_API}.CONSUMER.MSG.NEXT.{name}.*"] if store.bulky else []
        if role in store.works:
            found += [f"{_API}.CONSUMER.DURABLE.CREATE.{name}.*", f"{_API}.CONSUMER.MSG.NEXT.{name}.*", f"$JS.ACK.{name}.>"]
        if role in store.purges:
            found.append(f"{_API}.STREAM.PURGE.{name}")
        if not (role == "shard" and bound.layers is not None and store.stream == f"KV_{subjects.KV_PLACEMENT}"):
            found += [subject.replace("SHARD", bound.shard or "*") for subject in store.writes.get(role, ())]
    return found


def covers(pattern: str, subject: str) -> bool:
    """Whether a permission for `pattern` is one for `subject`, which may have wildcards itself."""
    wanted, given = pattern.split("."), subject.split(".")
    for index, word in enumerate(wanted):
        if word == ">":
            return len(given) > index
        if index >= len(given) or given[index] == ">" or (word not in ("*", given[index])):
            return False
    return len(wanted) == len(given)


def table() -> str:
    """Who sends and hears each kind of subject, and who makes, reads and writes each store, as tables in Markdown."""
    roles = [role for role in ROLES if role not in ("operator", "system")]
    lines = ["| role | who has it |", "|---|---|", *(f"| {role} | {purpose} |" for role, purpose in PURPOSES.items()), ""]
    lines += [f"| subject | {' | '.join(roles)} |", "|---|" + "---|" * len(roles)]
    for topic in topics.TOPICS:
        marks = [" ".join([*(["sends"] if role in topic.sends else []), *(["hears"] if role in topic.hears else [])]) for role in roles]
        lines.append(f"| `{topic.template}` | " + " | ".join(marks) + " |")
    lines += ["", f"| stream or bucket | {' | '.join(roles)} |", "|---|" + "---|" * len(roles)]
    for store in STORES:
        can = {"makes": store.makes, "reads": store.reads, "sees": store.sees, "works": store.works, "purges": store.purges}
        marks = [
            " ".join([*(word for word, of in can.items() if role in of), *(["writes"] if role in store.writes else [])]) for role in roles
        ]
        lines.append(f"| `{store.stream}` | " + " | ".join(marks) + " |")
    return "\n".join(" ".join(line.split()) for line in lines)


if __name__ == "__main__":
    print(table())
