"""The checkpoint format: manifest, nodes, JSON codec and safetensors shards, written and read.

Imports: checkpoint.storage, devices, errors, user_errors.
"""
