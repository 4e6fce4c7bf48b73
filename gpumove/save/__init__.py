"""SAVING: one rank's part, from a staged copy to durable packs. Knows bytes, boxes and a Store, never live tensors."""
