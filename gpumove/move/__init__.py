"""MOVING: what one store has is brought to another one, verified. Knows records and objects, never tensors."""
