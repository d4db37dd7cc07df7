"""Distillation of the teacher into a student on images."""
