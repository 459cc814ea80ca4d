"""Whether a machine and a mesh are well, and what to do where they are not: the checks of `mesh doctor`.

findings   what a check says: a level, what was found, what to do
site       what the checks look at, gathered once
machine    this machine: memory, processors, files, ports, disk
server     the NATS servers: reachable, near, encrypted; JetStream and what it keeps
needs      the subjects that each role needs (pure)
rights     whether this user has them
processes  versions, models, clocks, ranges, memory and HTTP of shards and coordinators
routes     one token through every replica of every range
run        all checks, in order
"""

from mesh.doctor.findings import Finding, Level, worst
from mesh.doctor.run import DoctorOptions, examine

__all__ = ["DoctorOptions", "Finding", "Level", "examine", "worst"]
