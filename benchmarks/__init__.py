"""Measurements of speed, learning, quantization and long texts; imports everything but the scripts."""
