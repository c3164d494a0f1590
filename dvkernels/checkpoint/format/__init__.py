"""The checkpoint format: manifest, nodes, JSON codec and safetensors shards, written and read.

Imports: checkpoint.storage, errors, user_errors.
"""
