"""NOTICES: whatever tells that this machine will be taken. Never touches tensors, stores or ranks."""
