"""Decoders that are built from named weights instead of being cut from a graph.

    registry.py         which model_type of a config.json is which family: the table to add an architecture to
    llama.py, gpt.py    the families: what a configuration means, and where each weight is
    spec.py             DecoderSpec and the weights of each block: what every family gives
    decoder.py          builds the blocks from these
    decoder_source.py   a spec and its weights as a Source
    config.py           config.json, with errors that say what to change
    tensors.py          named tensors, and a record of which were used
    rotary.py           rotary frequencies

To add an architecture of Hugging Face: give it a line in registry.py, and its defaults or a new family in one other file.
"""
