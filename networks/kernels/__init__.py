"""Fast application of adapters: the same outputs and gradients as `delta_weight()`, without an (out, in) tensor where maths allows.

`products.py` says how a frozen layer's product and a delta become one output, rounded once; `low_rank.py`, `kronecker.py` and
`materialised.py` are the ways to a delta, each an autograd function that keeps its input and what is smaller; `cost.py` chooses.
"""
