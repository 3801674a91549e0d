"""What changes a model: steering, LoRA, unlearning, each giving a `Treatment`, and how adapters are trained.

Knows models and instruments. Does NOT know outcomes or studies.
"""
