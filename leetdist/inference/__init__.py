"""Inference: streaming prefill, states that people keep, and decoding of many requests at once."""
