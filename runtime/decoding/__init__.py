"""Decoding many candidates per prompt: arena (memory), scheduler (which prompt), sampler, cut policy, engine (loop)."""
