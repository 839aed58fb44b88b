"""The speech codec trained on Ray Train: data parallel, resumable, numbers that do not depend on the workers."""
