"""A small stand-in for Arc2Face: a model of drawn faces that is told who to draw by a vector, and its judge."""
