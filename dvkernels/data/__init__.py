"""Batches in order: datasets as chains of nodes, and their distribution over replicas."""
