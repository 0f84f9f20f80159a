"""What checks an installation, and the library: calls on ranks against one device, and decoding against one call."""
