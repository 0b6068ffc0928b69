"""Networks to graphs, and rewrites of graphs."""
