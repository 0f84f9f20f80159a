"""The engine: tiles, lanes, the order of the fold over ranks, the two passes and their autograd; it knows no operator's
algebra."""
