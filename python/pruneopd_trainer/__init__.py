"""On-policy distillation with pruning (Prune-OPD, arXiv:2605.07804), end to end: a reference trainer to read and copy.

Start with `loop.py`, which is Algorithm 1. The command `pruneopd` is in `pruneopd_lab`.
"""
