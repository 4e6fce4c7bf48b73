"""TENSORS: live training objects to and from flat, named tensors and values. Knows torch, never a store."""
