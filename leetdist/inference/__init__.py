"""Inference: streaming prefill, states that people keep, and decoding of many requests at once.

- stream: a prompt in pieces, one after the other. windows: many pieces at a time; pieces: how they lie in memory;
  staging: pieces that come from host memory, and outputs that go there.
- state: what a sequence leaves, as an object. running: its open tile between two pieces. files: states on disk.
- steps, pool: decoding of many requests, on states in one tensor. exact: the same with the bits of one call.
- session: a language model in the middle of a text. attend: the operator in layers that train and decode with one set
  of bits.
- checks: what all of these ask of their arguments. state_checks: what they ask of states that are given back to them.
"""
