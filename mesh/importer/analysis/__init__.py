"""What an exported graph means, found by evaluating it on concrete sizes, not by its operators' names.

attention.py   the attention pattern of each layer
layout.py      how its queries, keys and values are laid out
mask.py        what it does to its scores: causal, window, ALiBi, scale, soft cap
layers.py      what each layer keeps: keys and values, states, or both
cut.py         where one layer ends and the next begins
wide_cut.py    the same where more than the hidden state goes from one to the next
positions.py   what depends on sizes and positions alone
"""
