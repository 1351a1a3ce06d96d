"""Klear-Reasoner in pure JAX: long chain-of-thought SFT, then GPPO, of Qwen3 models."""
