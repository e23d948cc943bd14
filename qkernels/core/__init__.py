"""What the front ends share: grids, observers, recipes, tracing, conversion, storage."""
