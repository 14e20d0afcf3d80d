"""Quantised weights: their formats, layers and checkpoints, and how they are made.

formats.py       every format, to the bit
layer.py         a quantised linear layer, and what it computes
checkpoint.py    files of such layers: their specification, `save` and `load`
calibration.py   what the layers of a model read while it paints
svdquant.py      smoothing and a low-rank branch (SVDQuant)
gptq.py          rounding that makes up for its own errors (GPTQ)
"""
