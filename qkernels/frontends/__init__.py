"""Front ends: the interfaces of other quantization packages over the core of this one. See docs/frontends.md."""
