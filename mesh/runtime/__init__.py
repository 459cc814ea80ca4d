"""One layer range on one device: compiled programs, KV cache, steps, sampling.

engine           what a shard needs of a stage: the Engine protocol
stage            the engine that keeps keys and values
recompute        the engine that keeps only its input and computes rows again
generate         a whole model in one process, without a mesh
programs         which programs a step runs, and compiling them
executables      compiled programs kept on disk across processes
buckets          the few shapes that steps are padded to
segments         the tokens of several sessions in one packed step
packing          which stages can run packed steps, and how the others do
row_states       where the states of a row stand, for models whose layers carry some
step             one block's part of a step
cache            attention over the KV cache
sampling         the next token from logits
shaping          grammars and biases, which change logits before
loading          a block's file to a function and its weights
canonical        equal blocks share one compiled program
kernel_variants  the fastest variant of each product on this machine
device           settings of JAX for the whole process
"""
