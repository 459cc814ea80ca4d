"""The coordinator's decisions: events in, effects out. Pure: no await; the time and the randomness are passed in.

It imports the packages below the coordinator (protocol, types, errors), and none of the coordinator's files outside core/.

machine.py       Core: one turn, from an event to its effects
state.py         what the core knows
events.py        the events and the effects
session.py       the states of one generation
admission.py     which requests wait
routing.py       which shards a session goes through
rows.py          rows asked for, open, given back
prefixes.py      which rows hold what a new session begins with
scheduler.py     which frame goes out next
pace.py          how large a prefill chunk is
watch.py         when a frame has been away for too long
leases.py        which shards live, by what was heard of them
losses.py        how the core answers losses, and how a session goes on
ends.py          how a session ends
peers.py         which other coordinators live
expectations.py  which shards the configuration asks for
"""
