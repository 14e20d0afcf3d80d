"""SANA as ONNX graphs and TensorRT engines: export, parity check, engine build. Installed as `sana_export`."""
