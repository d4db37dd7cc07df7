"""Synthesis of images from a teacher without data, in numbered batches that form a pool."""
