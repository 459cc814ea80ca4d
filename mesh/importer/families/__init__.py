"""Decoder blocks built from weights: `spec` says what a decoder is, `decoder` builds its blocks, `huggingface` reads config.json."""
