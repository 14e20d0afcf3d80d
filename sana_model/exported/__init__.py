"""Painting with exported networks: pipeline.py is the pipeline, onnxruntime.py and tensorrt.py run its graphs."""
