"""Rewards behind one protocol: sequence classifiers, plain functions, likelihood under a causal model."""
