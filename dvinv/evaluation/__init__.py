"""Evaluation of networks and of synthesized images."""
