"""Blocks on their way to disk. docs/model-format.md says what a block is.

emit.py             one block's part of an exported graph, as a block
emit_attention.py   its attention
emit_values.py      its names, types, sizes, positions and weights
blocks.py           GraphBuilder: nodes and weights of one block, whatever the source
quantize.py         weights in 8 bits
narrow.py           weights in 4 and 6 bits: codes, scales and minima with the least error
narrow_nodes.py     the nodes that such a weight is in a block
kept.py             weights as their source has quantized them
writer.py           BlockWriter: one block's files, one tensor in memory at a time
"""
