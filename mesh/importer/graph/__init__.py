"""An exported decoder as data.

decoder.py    DecoderGraph and what each value depends on; Draft, which passes rewrite
edit.py       new nodes and constants, a branch in place of its If
evaluate.py   one node on numbers
probe.py      shapes and numbers of any value at one choice of sizes
"""
