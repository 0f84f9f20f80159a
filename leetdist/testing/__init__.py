"""What checks the library: cases, the comparison of ranks with one device, and process launchers for tests."""
