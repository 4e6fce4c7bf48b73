"""Shards of a dataset on a local disk before training asks for them. What is in them it never knows."""
