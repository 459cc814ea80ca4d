"""What transformers' own implementation of a model computes: its graph, its weights, its logits. Needs the extra `trace`.

library.py     torch and transformers, or how to install them
refused.py     families that are refused by what their config.json says, before torch is loaded
model.py       a directory's model without weights in memory, and what such a model shows that is refused
weights.py     the model's parameters from the checkpoint, one at a time
gguf_table.py  what the architectures of GGUF files are in transformers; gguf_config.py makes the configuration of a file's metadata,
               gguf_weights.py its parameters of the tensors; gguf_carrying.py is the table where layers carry states
export.py      one graph with a past and a present, its weights read when they are needed
latent.py      caches that hold what latents expand to
states.py      caches whose layers carry states of a fixed size
recurrences.py  what such layers compute, in a form that a graph can hold
own_states.py  the same of families that keep their states in their modules, or in a cache of their own
indexers.py    attention that an indexer makes sparse, up to as many positions as it chooses
attention_forms.py  attention of single families over one list of keys and values
python_forms.py  what single families compute by Python's means, for a graph
complex_numbers.py  complex rotary positions as pairs of real numbers
reference.py   the model's own logits, one module's weights in memory at a time
tokenizer.py   a tokenizer that has no tokenizer.json, converted
"""
