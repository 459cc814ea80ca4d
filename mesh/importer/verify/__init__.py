"""Check a model directory before it is put in its place.

    verify.py   compares source, stock onnxruntime and our runtime; names the first layer that differs
    oracle.py   onnxruntime on a source, on its parts and on blocks
    report.py   what storing weights in fewer bits costs, for `mesh import --report`

This is the one room of the importer that imports mesh/runtime.
"""
