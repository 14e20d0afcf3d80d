"""Models on disk and in memory: models.py finds, loads and converts them; the rest is what it takes for that."""
