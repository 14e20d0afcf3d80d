"""Quantising a model: model.py is the job, layers.py what it leaves in a network."""
