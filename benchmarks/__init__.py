"""How fast and how small it is, beside its peers and beside code written by hand.

``python -m benchmarks`` from the root of the repository runs all of it.
"""
