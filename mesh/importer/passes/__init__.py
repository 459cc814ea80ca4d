"""Passes that bring an exported graph to one form. pipeline.py has the list, in order, with the reason of each place.

branches.py     an If whose condition never varies; the two halves of optimum's merged decoders
inputs.py       the role of each input, and the logits
opset.py        opset 11 to 24
contrib.py      com.microsoft operators; rules in contrib_norms, contrib_products, contrib_attention, helpers in contrib_rewriter
nbits.py        onnxruntime's packed 4-bit and 8-bit weights
casts.py        the type of a CastLike
sequences.py    a tensor that is split into a sequence and taken apart again
einsum.py       an Einsum that is a matrix product
identities.py   nodes that hand their input on
sinks.py        attention sinks that are a factor, as one more score
shifts.py       the highest score, subtracted before a softmax
batch.py        exports for one row
experts.py      experts that choose rows by the tokens
"""
