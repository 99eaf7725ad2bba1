"""Distillation, pretraining and preference optimisation."""
