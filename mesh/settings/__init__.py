"""Configuration files.

schema    every file's sections and keys
files     read a file, fill in ${VARIABLES}, let the environment override keys
nats_context  contexts of the `nats` command
units     sizes, rates and durations as people write them
defaults  addresses and ports when nothing else is said
"""
