"""The process and the machine it runs on.

signals    the event loop, and what SIGTERM and SIGINT do
process    children that end with their parent, memory, the garbage collector
pages      mapped files, copied piece by piece
machine    memory, processors, open files, ports and disk, with the limits of a container
turns      large pieces of work on the event loop, one at a time
processor  what the machine computes with
locks      a lock on an open file
known_files  where files of known content are on this host
scratch    temporary folders that are always removed
paths      the cache folder
"""
