"""Check a model directory before it is put in its place.

    verify.py   compares source, stock onnxruntime and our runtime; names the first layer that differs
    outside.py  the engine that runs a source itself: onnxruntime for an export, transformers for a Hugging Face directory
    oracle.py   onnxruntime on a source, on its parts and on blocks
    size.py     bits a weight, all told
    report.py   what storing weights in fewer bits costs, for `mesh import --report`

This is the one room of the importer that imports mesh/runtime.
"""
