"""Turn a source (ONNX export, Hugging Face directory, GGUF file) into a verified model directory: `mesh import`.

Only `mesh import` uses this package; everything else reads the model directory that it writes.

    run.py       import_model: open the source, write the blocks, verify them, put the directory in its place
    survey.py    what --bits 4 knows of the weights before it rounds them
    verify/      compare the source, its blocks in stock onnxruntime, and its blocks in our runtime
    sources/     one module for each kind of source; all offer the same Source
    families/    decoders that are built from named weights: safetensors and GGUF
    trace/       transformers' own implementation of any other decoder: its graph, its weights, its logits
    write/       blocks: their graphs, the quantization of their weights, their files
    analysis/    what an exported graph means: attention, masks, positions, where layers end
    passes/      rewrite an exported graph to the one form that the analysis reads; pipeline.py has the list
    graph/       an exported decoder as data, and the evaluation of its parts on concrete sizes
    options.py   what a user chooses at import
    precision.py which weights get 4 bits and which 6

A room imports only rooms below it in this list.
"""
