"""OBJECTS: keys and bytes in an object store, never tensors. The only room that knows fsspec."""
